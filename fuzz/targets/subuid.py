"""Fuzzes /etc/subuid, which assigns uids to users. Only root writes it, with lines that name any user.

Never raises. Root belongs to no other user. An owner of a range belongs to itself. A uid lies in a range of its owner.
"""

from __future__ import annotations

from fuzz.target import holds, same
from upcall.wire.subuid import take_subuid

SEEDS = [
    b"alice:100000:65536\nbob:165536:65536\n",
    b"1000:100000:65536\n# nothing\n\n1001:100000:1\n",
    b"alice:0:1\nalice:1:0\nmoon:1:1\nalice:4294967295:1\nalice:99999999999:1\n:1:1\n",
]
_UIDS = {"alice": 1000, "bob": 1001}


def run(data: bytes) -> None:
    people = take_subuid(data.decode("utf-8", "surrogateescape"), _UIDS.get).people
    same(people.of(0), 0)
    for uid in (1, 1000, 1001, 100000, 165535, 165536, 0xFFFFFFFE):
        owner = people.of(uid)
        same(people.of(owner), owner)
        holds(owner == uid or len(people) > 0, "an owner without a range")

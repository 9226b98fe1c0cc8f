"""Fuzzes bodies of quota notices, and the texts made from them: users choose names.

Raises only PeerError. A notice packs to one that parses to the same values. Sentences are printable, so they contain
no escape sequences in any encoding.
"""

from __future__ import annotations

from upcall_quota.terminal import _line
from upcall_quota.words import headline, person, urgency

from fuzz.target import holds, same, taken
from upcall.protocols.quota.notice import Cause, Filesystem, QuotaNotice, Raw, Subject, pack, sentence, take

_NOTICE = QuotaNotice(
    "over-soft", "space", Subject("user", 1000, "ada"), Cause(1000, "ada"), Filesystem("/home", "/dev/sda1", "ext4"),
    5 << 30, 4 << 30, 6 << 30, 1_700_000_000, 125, 1_600_000_000, 1, 0, Raw(0, 4, 8, 1),
)  # fmt: skip
SEEDS = [
    pack(_NOTICE),
    pack(_NOTICE._replace(event="near", subject=Subject("group", 7, "x\x1b[2J"), grace_until=None, raw=None)),
    pack(_NOTICE._replace(event="digest", resource="files", cause=Cause(None, None), count=7, lost=3)),
    b'{"version":1,"at":' + b"9" * 5000 + b"}",
    b'{"version":1,"at":' + b"[" * 3000 + b"}",
]


def run(data: bytes) -> None:
    notice = taken(take, data)
    if notice is None:
        return
    same(take(pack(notice)), notice)
    urgency(notice)
    person(notice)
    for reader in (None, 0, 1000):
        text = sentence(notice, 1.6e9, reader)
        holds(headline(notice).isprintable(), "a headline that is not printable")
        for utf8 in (True, False):
            line = _line(text, utf8).decode("utf-8" if utf8 else "ascii")
            holds(line[:2] == line[-2:] == "\r\n" and line[2:-2].isprintable(), "an order to a terminal")

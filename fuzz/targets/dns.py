"""Fuzzes answers of name servers, parsed by dnspython: from any attacker on the network path.

Raises only Refused and NotThere. Results pass the broker's check for every kind of request. Expiry, addresses and
servers are within their limits.
"""

from __future__ import annotations

import contextlib
import errno
import time
from pathlib import Path
from typing import Any, cast

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.nameserver
import dns.rdatatype
import dns.resolver
from upcall_dns import _instance
from upcall_dns.names import Names, NotThere

from fuzz.target import holds
from upcall.core.errors import Refused
from upcall.protocols.request_key.dns_resolver import MAX_EXPIRY, check_answer, take_callout, take_description
from upcall.protocols.request_key.messages import Ask, pack_ask, pack_instance

_NOWHERE = Path("/nonexistent")
_ASKED = [(b"a:host.test", b""), (b"aaaa:host.test", b""), (b"host.test", b"list"), (b"afsdb:cell.test", b"srv=1")]


def _answer(name: str, kind: str, *records: str) -> bytes:
    response = dns.message.make_response(dns.message.make_query(name, kind, id=7))
    for line in records:
        owner, rest = line.split(" ", 1)
        kind_of, text = rest.split(" ", 1)
        response.answer.append(dns.rrset.from_text(f"{owner}.", 300, "IN", kind_of, text))
    return response.to_wire()


SEEDS = [
    b"\0" + _answer("host.test.", "A", "host.test A 192.0.2.1"),
    b"\1" + _answer("host.test.", "AAAA", "host.test CNAME other.test.", "other.test AAAA 2001:db8::1"),
    b"\2" + _answer("host.test.", "A"),
    b"\3" + _answer("_afs3-vlserver._udp.cell.test.", "SRV", "_afs3-vlserver._udp.cell.test SRV 1 2 7003 host.test."),
    b"\3" + _answer("cell.test.", "AFSDB", "cell.test AFSDB 1 host.test."),
]
MOST = 4096
MEMORY = 8 << 20


class _NameServer(dns.nameserver.Nameserver):
    """Answers every query with the same bytes, except for the question, which must match to be accepted."""

    def __init__(self, data: bytes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._data, self._asked = data, 0

    def __str__(self) -> str:
        return "played"

    def kind(self) -> str:
        return "played"

    def is_always_max_size(self) -> bool:
        return True

    def answer_nameserver(self) -> str:
        return "192.0.2.53"

    def answer_port(self) -> int:
        return 53

    def query(self, request: dns.message.QueryMessage, timeout: float, *_: Any, **__: Any) -> dns.message.Message:
        self._asked += 1
        if self._asked > 8:
            raise TimeoutError(errno.ETIMEDOUT, "played")
        response = dns.message.from_wire(self._data, ignore_trailing=True)
        question = request.question
        with contextlib.suppress(IndexError, AttributeError):
            same = response.question[0].rdtype == question[0].rdtype
            if same and not response.flags & dns.flags.TC:
                response.question = question
        response.id = request.id
        if not request.is_response(response):
            raise dns.exception.FormError("not an answer to this")  # type: ignore[no-untyped-call]
        return response


def run(data: bytes) -> None:
    name, options = _ASKED[data[0] % len(_ASKED)] if data else _ASKED[0]
    query = take_description(name)
    names = Names.__new__(Names)
    names._hosts, names._deadline = _NOWHERE, time.monotonic() + 1.0
    made = dns.resolver.Resolver(configure=False)
    made.nameservers = cast(Any, [_NameServer(data[1:])])
    names._resolver = made
    try:
        found = _instance(names, query, take_callout(options, query))
    except Refused:
        return
    except NotThere:
        return
    holds(1 <= found.expiry <= MAX_EXPIRY, "for longer than allowed")
    check_answer(pack_ask(Ask(name, options)), pack_instance(found))

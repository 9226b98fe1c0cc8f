"""Fuzzes the forwarder's stand-in in Python: answers of the broker, which root's process passes to the kernel.

Never raises. The broker's rule accepts every cifs.spnego payload that it accepts. The kernel accepts every errno.
"""

from __future__ import annotations

from fuzz.target import holds, taken
from upcall.core.messages import Answer
from upcall.protocols.request_key.cifs_spnego import pack_payload, take_payload
from upcall.protocols.request_key.forwarder import standin
from upcall.protocols.request_key.messages import Instance, pack_instance
from upcall.wire.envelope import pack_response, refusal

_SEQ = 7
SEEDS = [
    b"\0" + pack_response(_SEQ, 0, Answer(pack_instance(Instance(60, pack_payload(b"k" * 16, b"b" * 16))))),
    b"\1" + pack_response(_SEQ, 0, Answer(pack_instance(Instance(60, b"192.0.2.1#dnserror=3\0")))),
    b"\0" + pack_response(_SEQ, 0, refusal("locked")),
]


def run(data: bytes) -> None:
    kind = b"dns_resolver" if data and data[0] & 1 else b"cifs.spnego"
    code, expiry, payload = standin.decide(kind + b";0;0;3f010000;x", _SEQ, data[1:])
    if code:
        holds(not payload and 1 <= code < 4095 and not 512 <= code <= 516, "an errno that is none")
    else:
        holds(0 <= expiry < 1 << 32, "an expiry out of bounds")
        holds(kind != b"cifs.spnego" or taken(take_payload, payload) is not None, "an unchecked payload")
    text = data.decode("latin-1")
    holds(0 <= standin.number_in(text, 1 << 31) <= 1 << 31, "a number out of bounds")

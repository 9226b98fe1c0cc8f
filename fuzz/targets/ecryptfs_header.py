"""Fuzzes headers of lower files, which any user with write access can make.

Raises only PeerError. A header packs to one that parses to the same values.
"""

from __future__ import annotations

from fuzz.target import same, taken
from upcall.protocols.ecryptfs.header import (
    ENCRYPTED,
    Header,
    PassphrasePacket,
    PublicKeyPacket,
    has_marker,
    pack_header,
    take_header,
)

_PUBLIC = PublicKeyPacket("80f0e50e8a936f95", b"w" * 256)
_PASSPHRASE = PassphrasePacket("0123456789abcdef", b"k" * 16, 0x07, b"saltsalt", 0x60)
SEEDS = [
    pack_header(Header(5, 0xDEADBEEF, 3, ENCRYPTED, 4096, 2, packets))
    for packets in ((_PUBLIC,), (_PASSPHRASE,), (_PUBLIC, _PASSPHRASE))
]


def run(data: bytes) -> None:
    has_marker(data)
    header = taken(take_header, data)
    if header is not None:
        packed = taken(pack_header, header)
        if packed is not None:
            same(take_header(packed), header)

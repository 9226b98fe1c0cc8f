"""Fuzzes the replacement of packets in headers of lower files, which any user with write access can make.

Raises only PeerError. Of a change: it is as long as what it replaces, begins behind the size and the marker, and ends
within what the kernel reads; the changed header has the wanted packets, and nothing else in it has changed. Records of
the journal are read back as written.
"""

from __future__ import annotations

from fuzz.target import same, taken
from fuzz.targets.ecryptfs_header import SEEDS as HEADERS
from upcall.protocols.ecryptfs.header import MAX_HEADER, PublicKeyPacket, replace_packets, take_header
from upcall.protocols.ecryptfs.rewrap_journal import Record, pack_records, take_records

SEEDS = [bytes((choice, size)) + header for header in HEADERS for choice in (0, 1, 255) for size in (1, 255)]


def run(data: bytes) -> None:
    taken(take_records, data)
    if len(data) < 2:
        return
    choice, size, header_bytes = data[0], data[1], data[2:].ljust(MAX_HEADER, b"\0")[:MAX_HEADER]
    header = taken(take_header, header_bytes)
    if header is None:
        return
    dropped = {number for number in range(len(header.packets)) if choice >> (number % 8) & 1}
    added = PublicKeyPacket("00112233445566aa", bytes((size | 1,)) * (size * 2 or 1))
    change = taken(replace_packets, header_bytes, dropped, added)
    if change is None:
        return
    same(len(change.old), len(change.new))
    same(header_bytes[change.at : change.at + len(change.old)], change.old)
    same(change.at >= 20 and change.at + len(change.new) <= MAX_HEADER - 8, True)
    changed = header_bytes[: change.at] + change.new + header_bytes[change.at + len(change.new) :]
    after = take_header(changed)
    same(after._replace(packets=header.packets), header)
    kept = [packet for number, packet in enumerate(header.packets) if number not in dropped]
    kept.insert(min(dropped, default=len(kept)), added)
    same(after.packets, tuple(kept))
    record = Record("/a", changed[8:16], 0o644, change)
    same(take_records(pack_records([record])), [record])

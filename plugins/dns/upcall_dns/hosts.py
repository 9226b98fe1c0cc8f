"""Looks names up in /etc/hosts (hosts(5))."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}


def text_of(address: str, family: int) -> str | None:
    """Returns the address as inet_ntop writes it; None if it is not an address of this family (4 or 6)."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: not ASCII, or a NUL in it
        return socket.inet_ntop(FAMILIES[family], socket.inet_pton(FAMILIES[family], address))
    return None


def packed(address: str) -> bytes:
    """Returns the bytes of an address as written by `text_of`, in network byte order."""
    return socket.inet_pton(FAMILIES[6 if ":" in address else 4], address)


def look_up(file: Path, name: str, families: tuple[int, ...]) -> list[str]:
    """Returns the addresses of all lines with the name, in the file's order. Empty if the file does not exist."""
    wanted = name.lower()
    found = []
    with contextlib.suppress(OSError), file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if wanted not in line.lower():
                continue
            address, *names = line.partition("#")[0].split() or [""]
            if wanted in (one.lower() for one in names):
                found += [text for family in families if (text := text_of(address, family))]
    return found

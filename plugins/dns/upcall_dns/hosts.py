"""/etc/hosts, as hosts(5) has it."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}


def text_of(address: str, family: int) -> str | None:
    """The address as inet_ntop writes it; None if it is none of this family (4 or 6)."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: not ASCII, or a NUL in it
        return socket.inet_ntop(FAMILIES[family], socket.inet_pton(FAMILIES[family], address))
    return None


def packed(address: str) -> bytes:
    """The bytes of an address that text_of() has written."""
    return socket.inet_pton(FAMILIES[6 if ":" in address else 4], address)


def look_up(file: Path, name: str, families: tuple[int, ...]) -> list[str]:
    """The addresses of every line that has the name, in the file's order. A file that is not there has none."""
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

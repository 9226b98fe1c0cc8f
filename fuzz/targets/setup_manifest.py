"""Fuzzes the list of what `upcall setup` has installed: root's file, by which root removes files.

Raises only ConfigError. Every path is absolute and without "..".
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

from fuzz.target import holds, same, taken
from upcall.config import ConfigError
from upcall.install import manifest
from upcall.install.manifest import Manifest

SEEDS = [
    manifest.shown(Manifest("systemd", {"/etc/x": "0" * 64}, ("/etc/y",), True, True)),
    b'{"kind":' + b"[" * 3000,
    b'{"kind":' + b"9" * 5000,
    b'{"kind":"","files":{"/../x":""},"folders":[],"request_key":0,"settled":0}',
]


class _File:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def read_bytes(self) -> bytes:
        return self._data

    def __str__(self) -> str:
        return "setup.json"


def run(data: bytes) -> None:
    found = taken(manifest.read, cast(Path, _File(data)), refuse=(ConfigError,))
    if found is not None:
        holds(all(name[0] == "/" and "/../" not in f"{name}/" for name in (*found.files, *found.folders)), "a path")
        same(manifest.read(cast(Path, _File(manifest.shown(found)))), found)

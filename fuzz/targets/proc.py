"""Fuzzes /proc/PID/stat, /proc/PID/status and /proc/keys: users choose names of processes and descriptions of keys.

Raises only the documented errors. The fields behind any name are found. A key's description cannot forge a pid.
"""

from __future__ import annotations

import re
from unittest import mock

from fuzz.target import holds, same, taken
from upcall.kernel import ancestry, procfs
from upcall.protocols.request_key import origin

_STAT = b"4711 (%b) S %b 4711 4711 0 -1 4194560 1 0 0 0 1 2 0 0 20 0 1 0 8812345 1 2 3\n"
_STATUS = b"Name:\t%b\nUmask:\t0022\nState:\tS (sleeping)\nTgid:\t4711\nNgid:\t0\nPid:\t4711\nUid:\t1000\t1001\t0\t0\n"
_KEYS = b"00000010 I--Q---     1 perm 0b010000  0     0 .request_ key:20 pid:%b ci:4\n"
SEEDS = [
    b"name",
    b"\x0bUid:\t0\t",
    b"\x1cUid:\t0\t",
    b"a) S 0 (b",
    b") R 1 1\nUid:\t0\t0\t0\t0",
    b"x\nTgid:\t1",
    b"20 pid:1 ci:2\n00000020",
    bytes(16),
]
MOST = 4096


class _Keys:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def read_bytes(self) -> bytes:
        return self._data


def _stat(name: bytes, pid: int) -> list[bytes]:
    parent = b"1" if pid == 4711 else b"0"
    return procfs.stat_in(_STAT % (name, parent))


def run(data: bytes) -> None:
    name = data[:64].replace(b"\0", b"")
    with mock.patch.object(procfs, "stat", lambda pid: _stat(name, pid)):
        same(procfs.started_at(4711), 8812345)
        same(ancestry.line_of(4711), {(4711, 8812345), (1, 8812345)})
    escaped = name.replace(b"\\", b"\\\\").replace(b"\n", b"\\n")  # as fs/proc/array.c writes it
    with mock.patch.object(procfs, "read", lambda pid, what: _STATUS % escaped):
        same(procfs.ids(4711), (4711, 1000, 1001))
        same(procfs.real_uid_in(_STATUS % escaped), 1000)
        numbers = re.fullmatch(rb"[0-9]{1,9}", data)
        with mock.patch.object(origin, "KEYS", _Keys(_KEYS % data)):
            found = origin.asked_by(0x10)
        holds(found == 4711 if numbers else found in (0, 4711), "a pid that nobody has")
    for text in (data, _STATUS[:20] + data):  # no kernel writes that
        with mock.patch.object(procfs, "read", lambda pid, what, text=text: text):
            taken(procfs.ids, 1, refuse=(ProcessLookupError,))
        procfs.real_uid_in(text)

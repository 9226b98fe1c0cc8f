"""What the broker asks the kernel about an upcall of request_key: the keys themselves, and the process behind it.

Source: keyctl(2), proc(5), pidfd_open(2).
"""

from __future__ import annotations

import os
import re
import select
from pathlib import Path

from upcall.kernel.keyring import describe_raw
from upcall.protocols.request_key.messages import Described, take_described
from upcall.protocols.request_key.origin_check import Who

KEYS = Path("/proc/keys")

# Of /proc/PID/status, whose first line escapes what the name would bring.
_IDS = re.compile(rb"^Tgid:\t(\d+)\n.*?^Uid:\t(\d+)\t(\d+)\t", re.MULTILINE | re.DOTALL)


class Process:
    """The process that a thread belongs to, held by a pidfd: `who` stays true for as long as it `lives`."""

    def __init__(self, pid: int) -> None:
        """`pid`: of any of its threads. ProcessLookupError if there is none."""
        self._fd, held = _hold(pid)
        try:
            tgid, uid, euid = _status(pid)
            started = started_at(pid)
            if tgid != held or not self.lives:  # while it lives, nobody else can have its pid
                raise ProcessLookupError(f"pid {pid} has changed hands")
        except BaseException:
            self.close()
            raise
        self.who = Who(tgid, uid, euid, started)

    @property
    def lives(self) -> bool:
        """A thread can end before its process does: that is noticed by nobody here, and harms nobody."""
        return not select.select([self._fd], [], [], 0)[0]

    def close(self) -> None:
        os.close(self._fd)


def started_at(pid: int) -> int:
    """When a process or thread began, in clock ticks since boot. ProcessLookupError."""
    return int(stat_of(pid)[19])


def stat_of(pid: int) -> list[bytes]:
    """The fields of /proc/PID/stat from the state on. ProcessLookupError."""
    return _read(pid, "stat").rpartition(b")")[2].split()  # the name before it may hold anything


def key(serial: int) -> Described:
    """The kernel's words about a key. OSError if there is none that we may look at; PeerError if it is no sense."""
    return take_described(describe_raw(serial))


def asked_by(authorisation: int) -> int:
    """The process that has asked for a key, by the key's authorisation; 0 if it has gone, or the kernel does not say:
    /proc/keys lists what we may look at, and not at all where /proc shows processes only."""
    try:
        line = rb"^%08x .* pid:(\d+) ci:\d+$" % authorisation
        found = re.search(line, KEYS.read_bytes(), re.MULTILINE)
        return _status(int(found[1]))[0] if found else 0
    except (OSError, ValueError):
        return 0


def _hold(pid: int) -> tuple[int, int]:
    """(pidfd, pid) of the process that a thread belongs to."""
    try:
        return os.pidfd_open(pid), pid
    except ProcessLookupError:
        raise
    except OSError:  # not the first of its threads
        tgid, _, _ = _status(pid)
        return os.pidfd_open(tgid), tgid


def _status(pid: int) -> tuple[int, int, int]:
    """(process, real uid, effective uid)"""
    found = _IDS.search(_read(pid, "status"))  # on the hot path: the file has sixty lines
    if found is None:
        raise ProcessLookupError(f"pid {pid}")
    tgid, uid, euid = map(int, found.groups())
    return tgid, uid, euid


def _read(pid: int, name: str) -> bytes:
    try:
        fd = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)  # on the hot path
        try:
            return os.read(fd, 8192)
        finally:
            os.close(fd)
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(f"pid {pid}") from None

"""What the broker asks the kernel about an upcall of request_key: the keys themselves, and the process behind it.

Source: keyctl(2), proc(5), pidfd_open(2).
"""

from __future__ import annotations

import os
import re
import select

from upcall.kernel import procfs
from upcall.kernel.keyring import describe_raw
from upcall.protocols.request_key.messages import Described, take_described
from upcall.protocols.request_key.origin_check import Who

KEYS = procfs.KEYS

started_at = procfs.started_at


class Process:
    """The process that a thread belongs to, held by a pidfd: `who` stays true for as long as it `lives`."""

    def __init__(self, pid: int) -> None:
        """`pid`: of any of its threads. ProcessLookupError if there is none."""
        self._fd, held = procfs.hold(pid)
        try:
            tgid, uid, euid = procfs.ids(pid)
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


def key(serial: int) -> Described:
    """The kernel's words about a key. OSError if there is none that we may look at; PeerError if it is no sense."""
    return take_described(describe_raw(serial))


def asked_by(authorisation: int) -> int:
    """The process that has asked for a key, by the key's authorisation; 0 if it has gone, or the kernel does not say:
    /proc/keys lists what we may look at, and not at all where /proc shows processes only."""
    try:
        line = rb"^%08x .* pid:(\d+) ci:\d+$" % authorisation
        found = re.search(line, KEYS.read_bytes(), re.MULTILINE)
        return procfs.ids(int(found[1])).process if found else 0
    except (OSError, ValueError):
        return 0

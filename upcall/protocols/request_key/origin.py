"""Queries the kernel about an upcall of request_key: both keys, and the requesting process. Needs root.

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
    """Pins a process by a pidfd. `who` describes it; its pid cannot be reused while `lives` is true.

    `close` must be called once. May be used by any thread, one at a time.
    """

    def __init__(self, pid: int) -> None:
        """`pid`: of any of the process's threads. ProcessLookupError if there is no such thread, or the pid was reused
        meanwhile. OSError if no descriptor is left."""
        self._fd, held = procfs.hold(pid)
        try:
            tgid, uid, euid = procfs.ids(pid)
            started = started_at(pid)
            if tgid != held or not self.lives:  # the pid cannot have been reused while the process lives
                raise ProcessLookupError(f"pid {pid} was reused by another process")
        except BaseException:
            self.close()
            raise
        self.who = Who(tgid, uid, euid, started)

    @property
    def lives(self) -> bool:
        """Whether the process, not the thread, still lives. Does not block."""
        return not select.select([self._fd], [], [], 0)[0]

    def close(self) -> None:
        os.close(self._fd)


def key(serial: int) -> Described:
    """Returns the kernel's description of the key with this serial number (KEYCTL_DESCRIBE). OSError if there is none
    or it may not be viewed; PeerError if the text is malformed."""
    return take_described(describe_raw(serial))


def asked_by(authorisation: int) -> int:
    """Returns the pid of the process that requested a key, given the serial number of the authorisation key.

    Reads /proc/keys. 0 if the process has gone or the key is not listed: the broker may not view it, or /proc is
    mounted with subset=pid.
    """
    try:
        line = rb"^%08x .* pid:(\d+) ci:\d+$" % authorisation
        found = re.search(line, KEYS.read_bytes(), re.MULTILINE)
        return procfs.ids(int(found[1])).process if found else 0
    except (OSError, ValueError):
        return 0

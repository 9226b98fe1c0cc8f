"""`python -m upcall.process.logind UID CAUSE...`, started by upcall.protocols.ecryptfs.auto_lock only.

Descriptor 0 is its socket. A cause for which the keys are locked already ends with "!".
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys

from upcall.kernel.process import die_with_parent, harden
from upcall.process.logind import MAX_WORD, NO_LOGIND

_PATIENCE = 20  # seconds, the time-out of the start


def run(uid: int, causes: list[str]) -> int:
    """Reports logind's signals about `uid` until the daemon closes the socket. Returns the exit status."""
    die_with_parent(signal.SIGKILL)
    harden()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # from a terminal; the daemon ends this process
    daemon = socket.socket(fileno=os.dup(0))
    signal.alarm(_PATIENCE)
    try:
        from upcall.process.logind.signals import NoLogind, Watch
    except ImportError as error:
        return _end(daemon, f"the Python package jeepney cannot be used: {error}", NO_LOGIND)
    try:
        watch = Watch(daemon, uid, causes)
        signal.alarm(0)
        watch.run()
    except NoLogind as error:
        return _end(daemon, str(error), NO_LOGIND)
    except Exception as error:  # noqa: BLE001 - a message may be malformed in any way; the daemon restarts the process
        return _end(daemon, f"{type(error).__name__}: {error}", os.EX_TEMPFAIL)
    return os.EX_OK


def _end(daemon: socket.socket, why: str, status: int) -> int:
    with contextlib.suppress(OSError):  # the daemon has ended
        daemon.send(f"note {why}".encode("utf-8", "backslashreplace")[:MAX_WORD])
    return status


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1]), sys.argv[2:]))

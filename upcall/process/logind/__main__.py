"""`python -m upcall.process.logind UID CAUSE...`, started by upcall.protocols.ecryptfs.auto_lock only.

Descriptor 0 is its socket.

A cause for which the keys are locked already ends with "!".
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys

from upcall.kernel.process import die_with_parent, harden
from upcall.process.logind import MAX_WORD, NO_LOGIND

_PATIENCE = 20  # seconds until it listens, or is given up


def run(uid: int, causes: list[str]) -> int:
    die_with_parent(signal.SIGKILL)
    harden()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the daemon decides when it ends
    told = socket.socket(fileno=os.dup(0))
    signal.alarm(_PATIENCE)
    try:
        from upcall.process.logind.signals import NoLogind, Watch
    except ImportError as error:
        return _end(told, f"the Python package jeepney cannot be used: {error}", NO_LOGIND)
    try:
        watch = Watch(told, uid, causes)
        signal.alarm(0)
        watch.run()
    except NoLogind as error:
        return _end(told, str(error), NO_LOGIND)
    except Exception as error:  # noqa: BLE001 - a bus may say anything; a new process begins anew
        return _end(told, f"{type(error).__name__}: {error}", os.EX_TEMPFAIL)
    return os.EX_OK


def _end(told: socket.socket, why: str, status: int) -> int:
    with contextlib.suppress(OSError):  # the daemon has gone
        told.send(f"note {why}".encode("utf-8", "backslashreplace")[:MAX_WORD])
    return status


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1]), sys.argv[2:]))

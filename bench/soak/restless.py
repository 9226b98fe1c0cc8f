"""`python -m bench.soak.restless KIND SECONDS FOLDER UID BROKER DAEMON`: replaces one user's daemon again and again.

New daemons take over from running, stopped and killed ones. Meanwhile broker and the other daemon reload their
configuration. A process of its own with one thread, because it forks daemons.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from bench.noop import ALIAS
from bench.soak.traffic import Counts
from upcall.client import Client
from upcall.daemon import __main__ as daemon_main
from upcall.daemon.plugins import Module, Plugins
from upcall.daemon.settings import DaemonSettings
from upcall.kernel.process import die_with_parent

_PATIENCE = 20.0
_PAUSE = 1.0  # seconds between two daemons


class Restless:
    def __init__(self, folder: Path, uid: int) -> None:
        self._folder, self._uid = folder, uid
        self._runtime = tempfile.mkdtemp(prefix="run-", dir=folder.parent)
        os.chown(self._runtime, uid, -1)
        self.pid = 0

    def turn(self, number: int, counts: Counts) -> None:
        before = self.pid
        if before and number % 3 == 1:
            os.kill(before, signal.SIGSTOP)
            counts.of["stopped"] += 1
        if before and number % 3 == 2:
            _end(before)
            counts.of["killed"] += 1
        self.pid = self._start()
        counts.of["daemons"] += 1
        if before and number % 3 != 2:
            _end(before)

    def _start(self) -> int:
        """Starts a daemon, and waits until it is registered. Returns its pid."""
        pid = os.fork()
        if not pid:
            self._become_a_daemon()
        end = time.monotonic() + _PATIENCE
        with Client(self._folder) as client:
            while not any(one["pid"] == pid for one in client.status()["daemons"]):
                if time.monotonic() > end:
                    raise TimeoutError(f"the daemon {pid} has not registered")
                time.sleep(0.02)
        return pid

    def _become_a_daemon(self) -> None:
        try:
            os.setgroups([])
            os.setresgid(self._uid, self._uid, self._uid)
            os.setresuid(self._uid, self._uid, self._uid)
            die_with_parent(signal.SIGKILL)
            os.environ["XDG_RUNTIME_DIR"] = self._runtime
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            plugins = Plugins((Module(ALIAS, "bench.noop:module"),))
            daemon_main.serve_with(DaemonSettings(self._folder, plugins=plugins))
        finally:
            os._exit(0)


def _end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def main(_kind: str, seconds: str, folder: str, uid: str, *others: str) -> None:
    """Runs until the time is over. `uid`: -1: only reloads, without such a user."""
    counts = Counts(float(seconds))
    restless = Restless(Path(folder), int(uid)) if int(uid) >= 0 else None
    for number in itertools.count():
        if not counts.going():
            break
        if restless is not None:
            restless.turn(number, counts)
        for pid in map(int, others):
            os.kill(pid, signal.SIGHUP)
        counts.of["reloads"] += 1
        time.sleep(_PAUSE)
    if restless is not None:
        _end(restless.pid)
    counts.say()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Starts a user's daemon for a request, by a command, usually of the service manager; with back-off after failures."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from upcall.core.errors import error_words
from upcall.process import start_python as startpython
from upcall.process.log import EventLog
from upcall.process.loop import URGENT, Loop

# Starts the user's manager, which starts the daemon. Starting the daemon itself (systemctl --user
# --machine={uid}@.host) would need the user's D-Bus, open a session that ends at once, and take five times as long.
COMMAND = ("systemctl", "start", "user@{uid}.service")
WITHOUT_SYSTEMD = tuple(startpython.command("upcall.install.sessions", "start", "{uid}", isolated=True))
_SYSTEMD_RUNS = Path("/run/systemd/system")  # sd_booted(3)

_PATIENCE = 20.0  # seconds, the time-out of a command
_AGAIN = 5.0  # seconds of back-off after a failure
_AT_ONCE = 16  # commands that may run at a time
_ENVIRONMENT = startpython.fixed()


def usual() -> tuple[str, ...]:
    """Returns the default command for this machine, with or without systemd."""
    return COMMAND if _SYSTEMD_RUNS.is_dir() else WITHOUT_SYSTEMD


class _Command:
    """A running command: readable once it has ended (pidfd_open(2))."""

    def __init__(self, launcher: Launcher, uid: int, name: str, pid: int, deadline: float) -> None:
        self._launcher, self._uid, self.name, self.pid, self.deadline = launcher, uid, name, pid, deadline
        self._fd = os.pidfd_open(pid)

    def fileno(self) -> int:
        return self._fd

    def ended(self) -> None:
        _, status = os.waitpid(self.pid, 0)
        self._launcher.ended(self._uid, self, os.waitstatus_to_exitcode(status))

    def close(self) -> None:
        os.close(self._fd)


class Launcher:
    """Runs the start command, at most once at a time per uid. Its exit status 0 does not mean that the daemon runs:
    requests wait for the daemon's HELO, or their deadline. Methods run in the loop's thread and do not block."""

    def __init__(self, loop: Loop, log: EventLog, given_up: Callable[[int], None], command: Sequence[str]) -> None:
        """`given_up(uid)`: called when the command has failed. `command`: its words; `{uid}` in them is replaced."""
        self._loop, self._log, self._given_up, self._command = loop, log, given_up, command
        self._running: dict[int, _Command] = {}
        self._not_before: dict[int, float] = {}
        self._timer = loop.timer(self._expire)

    def use(self, command: Sequence[str]) -> None:
        """Replaces the command. Resets the back-off if it differs."""
        if command != self._command:
            self._command = command
            self._not_before.clear()

    def start(self, uid: int) -> bool:
        """Starts the command unless it runs. False during back-off, at the limit of commands, or if it fails."""
        now = self._loop.now
        if uid in self._running:
            return True
        if self._not_before.get(uid, 0.0) > now or len(self._running) >= _AT_ONCE:
            return False
        words = [word.replace("{uid}", str(uid)) for word in self._command]
        try:
            null = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in (0, 1)]
            pid = os.posix_spawnp(words[0], words, _ENVIRONMENT, file_actions=null, setpgroup=0)
        except OSError as error:
            self._failed(uid, error_words(error))
            return False
        command = self._running[uid] = _Command(self, uid, words[0], pid, now + _PATIENCE)
        self._loop.add(command, command.ended, URGENT)
        self._timer.at(command.deadline)
        self._log("daemon-starting", uid=uid, by=words[0])
        return True

    def ended(self, uid: int, command: _Command, code: int) -> None:
        self._forget(uid)
        if code != 0:
            self._failed(uid, f"{command.name} ended with {code}")
            self._given_up(uid)

    def _failed(self, uid: int, why: str) -> None:
        self._log("daemon-start-failed", uid=uid, why=why)
        self._not_before = {one: when for one, when in self._not_before.items() if when > self._loop.now}
        self._not_before[uid] = self._loop.now + _AGAIN

    def _forget(self, uid: int) -> None:
        command = self._running.pop(uid)
        self._loop.remove(command)
        command.close()

    def _expire(self, now: float) -> None:
        """Kills commands after their time-out. A daemon that they started may still register."""
        for command in self._running.values():
            if command.deadline <= now:
                command.deadline = now + _PATIENCE
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(command.pid, signal.SIGKILL)
            self._timer.at(command.deadline)

    def close(self) -> None:
        for uid in tuple(self._running):
            self._forget(uid)

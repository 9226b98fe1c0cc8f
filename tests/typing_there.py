"""Runs a process on a pseudo-terminal, and types there."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Self

from upcall.testing.processes import PATIENCE, NotInTime


class Typist:
    """A process with a pseudo-terminal. `seen`: all its output so far."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Starts a Python program: `-m module ...`."""
        self.seen = ""
        self._looked = 0
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            try:
                for one in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):  # the parent of the tests may ignore them
                    signal.signal(one, signal.SIG_DFL)
                os.execve(sys.executable, [sys.executable, *arguments], {**os.environ, **(environment or {})})
            finally:
                os._exit(70)
        self._status: int | None = None

    def expect(self, words: str, timeout: float = PATIENCE) -> None:
        """Waits until the output contains `words`, after earlier expected words. NotInTime."""
        deadline = time.monotonic() + timeout
        while (at := self.seen.find(words, self._looked)) < 0:
            if not self._read(deadline):
                raise NotInTime(f"{words!r} is not to be seen in {self.seen[self._looked :]!r}")
        self._looked = at + len(words)

    def _read(self, deadline: float) -> bool:
        if not select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return False
        try:
            data = os.read(self._fd, 4096)
        except OSError:
            data = b""  # EIO: no process has the terminal open any more
        self.seen += data.decode("utf-8", "replace")
        return bool(data)

    def type(self, keys: str | bytes) -> None:
        os.write(self._fd, keys.encode() if isinstance(keys, str) else keys)

    def close_window(self) -> None:
        os.close(self._fd)
        self._fd = -1

    def ended(self, timeout: float = PATIENCE) -> int:
        """Waits for the process's end, and reads its remaining output. Returns its exit status."""
        deadline = time.monotonic() + timeout
        while self._fd >= 0 and self._read(deadline):
            pass
        watch = os.pidfd_open(self.pid)
        try:
            if not select.select([watch], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise NotInTime(f"process {self.pid} has not ended: {self.seen!r}")
        finally:
            os.close(watch)
        self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        if self._fd >= 0:
            self.close_window()

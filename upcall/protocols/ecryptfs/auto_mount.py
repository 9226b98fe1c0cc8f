"""Has the user's mounts mounted when the daemon starts, and taken away on events, by the commands `upcall mount
--login` and `upcall umount --on EVENT`.

They are child processes, which read what is remembered of the mounts: the daemon looks only whether there is any.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from pathlib import Path
from typing import Final

from upcall.process import start_python as startpython
from upcall.process.log import EventLog
from upcall.process.logind import LOGOUT

SUFFIX: Final = ".toml"  # of upcall/keys/mounts.py, which is not imported
_PATIENCE: Final = 120.0  # seconds until a command is killed
_PREFERRED: Final = 3.0  # seconds that an event waits for it: logind's delay of sleep is five


class AutoMount:
    """`folder`: where mounts are remembered; None: there are none. Any thread."""

    def __init__(self, folder: Path | None, log: EventLog) -> None:
        self._folder, self._log = folder, log

    def at_login(self) -> None:
        """Has the mounts that are marked `auto` mounted. Does not wait."""
        self._run("mount", "--login")

    def on_event(self, begins: bool, cause: str) -> None:
        """Handles an event that locks keys (True) or its end. Waits for a few seconds until it is done."""
        event = "logout" if cause == LOGOUT else "lock"
        thread = self._run("umount", "--on", event) if begins else self._run("mount", "--login")
        if thread is not None:
            thread.join(_PREFERRED)

    def _run(self, *words: str) -> threading.Thread | None:
        if not self._any():
            return None
        thread = threading.Thread(target=self._see_to, args=(words,), name="mounts", daemon=True)
        thread.start()
        return thread

    def _any(self) -> bool:
        if self._folder is not None:
            with contextlib.suppress(OSError):
                return any(file.name.endswith(SUFFIX) for file in self._folder.iterdir())
        return False

    def _see_to(self, words: tuple[str, ...]) -> None:
        """Runs a command, whose errors go to the daemon's standard error."""
        command = startpython.command("upcall", *words)
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
        ]
        try:
            pid = os.posix_spawn(command[0], command, startpython.cleaned(), file_actions=actions, setpgroup=0)
            with contextlib.closing(_Watch(pid)) as watch:
                status = watch.status()
        except (OSError, ChildProcessError) as error:
            self._log("mounts-failed", command=" ".join(words), why=error)
            return
        if status:
            self._log("mounts-failed", command=" ".join(words), status=status)
        else:
            self._log("mounts-updated", command=" ".join(words))


class _Watch:
    """A child process that is killed if it does not end in time."""

    def __init__(self, pid: int) -> None:
        self._pid, self._fd = pid, os.pidfd_open(pid)

    def status(self) -> int:
        """Returns its exit status; ChildProcessError if SIGCHLD is ignored."""
        if not select.select([self._fd], [], [], _PATIENCE)[0]:
            signal.pidfd_send_signal(self._fd, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])

    def close(self) -> None:
        os.close(self._fd)

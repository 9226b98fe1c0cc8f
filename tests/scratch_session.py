"""Runs commands of the documentation in a terminal, as an ordinary user with a home, a broker and a daemon of its own.

Root becomes another user for this. If that user cannot reach the interpreter (a pyenv in /root), it is mounted at its
place for the session alone, in a mount namespace.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

UID = 64987  # used by nothing else
PASSPHRASE = "correct horse battery"
PATIENCE = 120.0  # seconds, on a loaded machine
_MARK = "@@@"
_ASKED = re.compile(rb"(?i)(passphrase|once more|pin)[^\r\n]*: ?$")


class Ran(NamedTuple):
    status: int
    output: list[str]


def closed_folder() -> Path | None:
    """The folder that keeps other users from this interpreter; None if nothing does."""
    for path in (Path(sys.base_prefix), Path(sys.executable)):
        for above in reversed(path.parents):
            if not above.stat().st_mode & 0o001:
                return above
    return None


def prefix(folder: Path) -> list[str]:
    """The command with which an ordinary user's process is started; empty unless this is root."""
    if os.geteuid() != 0:
        return []
    become = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--inh-caps=-all"]
    closed = closed_folder()
    if closed is None:
        return become
    aside, python = shlex.quote(str(folder / "python")), shlex.quote(sys.base_prefix)
    script = (
        f"mkdir {aside} && mount --bind {python} {aside} && mount -t tmpfs -o mode=755 none {shlex.quote(str(closed))}"
        f' && mkdir -p {python} && mount --move {aside} {python} && exec "$@"'
    )
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *become]


def missing() -> str:
    """Why no session can be started here; empty if one can."""
    if os.geteuid() == 0:
        for program in ("setpriv", "unshare"):
            if shutil.which(program) is None:
                return f"{program} is not installed"
        if closed_folder() is not None and subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
            return "other users cannot reach this interpreter, and there are no mount namespaces here"
    return ""


class Session:
    """A shell in a terminal. Its folder is removed at the end, and so are its keys in the user keyring."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="upcall-docs-"))
        self.folder.chmod(0o755)
        for name in ("home", "run", "work"):
            (self.folder / name).mkdir(mode=0o700)
        if os.geteuid() == 0:
            for path in (self.folder / "home", self.folder / "run", self.folder / "work"):
                os.chown(path, UID, UID)
        self._master, terminal = pty.openpty()
        termios.tcsetwinsize(terminal, (50, 120))
        attributes = termios.tcgetattr(terminal)
        attributes[3] &= ~termios.ECHO
        termios.tcsetattr(terminal, termios.TCSANOW, attributes)
        environment = {
            "HOME": str(self.folder / "home"),
            "XDG_RUNTIME_DIR": str(self.folder / "run"),
            "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "LANG": "C.UTF-8",
            "TERM": "dumb",
            "NO_COLOR": "1",
            "COLUMNS": "120",
        }
        self._shell = subprocess.Popen(
            [*prefix(self.folder), "bash", "--norc", "--noprofile", "+m"],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env=environment,
            cwd=self.folder / "work",
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(terminal)
        self._number = 0
        self.run("PS1= PS2=")

    def run(self, command: str) -> Ran:
        """Runs a command as the shell does. Types the passphrase wherever one is asked for. AssertionError if it takes
        too long."""
        self._number += 1
        mark, script = f"{_MARK}{self._number}", self.folder / "command"
        script.write_text(f"{command}\n")
        # One line: reading a passphrase discards what was typed before.
        self._type(f". {script}; echo {mark} $?\n")
        text = self._read_until(mark)
        lines = text.replace("\r\n", "\n").split("\n")
        end = next(number for number, line in enumerate(lines) if mark in line)
        return Ran(int(lines[end].split(mark)[1]), [line for line in lines[:end] if line.strip()])

    def _read_until(self, mark: str) -> str:
        data, asked, end = b"", 0, time.monotonic() + PATIENCE
        done = re.compile(mark.encode() + rb" \d+\r?\n")
        while not done.search(data):
            if not select.select([self._master], [], [], max(0.0, end - time.monotonic()))[0]:
                raise AssertionError(f"not done within {PATIENCE:.0f} s: {data.decode('utf-8', 'replace')}")
            data += os.read(self._master, 65536)
            if _ASKED.search(data, asked):
                asked = len(data)
                self._type(f"{PASSPHRASE}\n")
        return data.decode("utf-8", "replace")

    def _type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def serve(self, name: str, *arguments: str) -> None:
        """Starts `upcall NAME` in the background, and waits until it works."""
        log = self.folder / "work" / f".{name}.log"
        self.run(f"upcall {name} {shlex.join(arguments)} 2> {log} &")
        end = time.monotonic() + PATIENCE
        ready = {"broker": "upcall status", "daemon": "upcall status | grep -q pid"}[name]
        while self.run(f"{ready} > /dev/null 2>&1").status:
            assert time.monotonic() < end, f"upcall {name} does not start: {log.read_text()}"

    def close(self) -> None:
        with contextlib.suppress(AssertionError, OSError):
            shown = self.run("upcall key list --json 2> /dev/null").output
            for name in re.findall(r'"name": "([^"]+)"', "\n".join(shown)):
                self.run(f"upcall key remove --yes {name} > /dev/null 2>&1")
            self.run("kill $(jobs -p) 2> /dev/null; wait")
        self._shell.send_signal(signal.SIGKILL)
        self._shell.wait()
        os.close(self._master)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def session(serving: Sequence[str] = ("broker", "daemon")) -> Iterator[Session]:
    """A session in which a broker and a daemon run."""
    made = Session()
    try:
        for name in serving:
            made.serve(name)
        yield made
    finally:
        made.close()

"""Starts brokers and daemons as processes in folders of their own, and waits for them with time-outs."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from upcall.client import Client, NoBroker
from upcall.core.errors import UpcallError
from upcall.kernel import procfs

PATIENCE = 60.0  # seconds that a test waits at most for what takes milliseconds on a quiet machine
T = TypeVar("T")


class NotInTime(UpcallError):
    """What a test waited for has not happened."""


def until(look: Callable[[], T | None], what: str, timeout: float = PATIENCE) -> T:
    """The first result of `look` that is not None or False; NotInTime after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        found = look()
        if found is not None and found is not False:
            return found
        if time.monotonic() > deadline:
            raise NotInTime(f"{what}: not within {timeout} s")
        time.sleep(0.002)


def in_time(work: Callable[[], T], what: str, timeout: float = PATIENCE) -> T:
    """What `work` returns or raises, in a thread of its own; NotInTime if it has not ended within `timeout` seconds.
    For what would wait for ever, or for an hour, if it were wrong."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout)
    if errors:
        raise errors[0]
    if not results:
        raise NotInTime(f"{what}: not within {timeout} s")
    return results[0]


class Started:
    """A process that we have started. Its log is a file; leaving the `with` block ends it."""

    def __init__(
        self, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None, stderr: int = -1
    ) -> None:
        self._log = log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-X",
                    "upcall-environment",
                    *arguments,
                ],  # plugins of tests are in PYTHONPATH, root's, too
                stdin=subprocess.DEVNULL,
                stderr=file if stderr < 0 else stderr,
                env={**os.environ, **(environment or {})},
            )
        self.pid = self.process.pid

    @property
    def log(self) -> str:
        return self._log.read_text("utf-8", "replace")

    def logged(self, words: str, timeout: float = PATIENCE) -> None:
        """Waits until `words` stand in the log."""
        until(lambda: words in self.log, f"{words!r} in the log", timeout)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self) -> None:
        """SIGSTOP, and waits until it has stopped."""
        self.signal(signal.SIGSTOP)
        until(lambda: procfs.state(self.pid) == "T", "stopped")

    def go_on(self) -> None:
        self.signal(signal.SIGCONT)

    def wait(self, timeout: float = PATIENCE) -> int:
        """Its exit status; NotInTime."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise NotInTime(f"process {self.pid} has not ended within {timeout} s") from None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()


class RunningBroker(Started):
    """A broker that serves `folder`; ready when this returns."""

    def __init__(
        self,
        folder: Path,
        stderr: int = -1,
        system: Path | None = None,
        related: bool = False,
        options: Sequence[str] = (),
    ) -> None:
        """`system`: the system's configuration file, if it is not to be that of this machine. `related`: it looks who
        descends from whom, as the real one does: then nobody can play a daemon and ask it, too. `options`: others of
        upcall.testing.broker's."""
        self.folder = folder
        arguments = ["-m", "upcall.testing.broker", f"folder={folder}", f"related={'yes' if related else 'no'}"]
        if system is not None:
            arguments.append(f"system={system}")
        arguments += options
        super().__init__(arguments, folder.parent / "broker.log", stderr=stderr)
        until(self._ready, "a broker that answers")

    def _ready(self) -> bool:
        if self.process.poll() is not None:
            raise NotInTime(f"the broker has ended: {self.log}")
        with contextlib.suppress(NoBroker):
            return bool(self.status()["broker"]["pid"] == self.pid)
        return False

    def client(self, timeout: float = PATIENCE, uid: int | None = None) -> Client:
        return Client(self.folder, uid, timeout)

    def status(self) -> dict[str, Any]:
        with self.client() as client:
            return client.status()

    def daemon(self) -> dict[str, Any] | None:
        """What the broker says of this user's daemon; None if there is none."""
        found = [one for one in self.status()["daemons"] if one["uid"] == os.getuid()]
        return found[0] if found else None

    def registered(self, pid: int) -> None:
        """Waits until the daemon of this user is `pid`."""
        until(lambda: (self.daemon() or {}).get("pid") == pid, f"daemon {pid} registered")

    def pending(self, count: int) -> None:
        """Waits until this user's daemon has been asked exactly `count` things that it has not answered."""
        until(lambda: len((self.daemon() or {"pending": []})["pending"]) == count, f"{count} pending")

    def outcomes(self, service: str = "key") -> dict[str, int]:
        found: dict[str, int] = self.status()["outcomes"].get(service, {})
        return found


class RunningDaemon(Started):
    """A daemon whose keyring is the folder `keys`. It may not be registered yet: see RunningBroker.registered."""

    def __init__(
        self,
        folder: Path,
        keys: Path,
        modules: Mapping[str, str],
        path: Sequence[Path] = (),
        control: bool = False,
        handlers: Sequence[str] = (),
        isolated: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`modules` and `handlers` are named "package:attribute", and found in `path`, too. `options`: of prompts."""
        run = folder.parent / "run"
        run.mkdir(mode=0o700, exist_ok=True)
        arguments = ["-m", "upcall.testing.daemon", f"folder={folder}", f"keys={keys}"]
        arguments += [f"module={alias}={spec}" for alias, spec in modules.items()]
        arguments += [f"handler={spec}" for spec in handlers]
        arguments += [f"isolated={alias}={spec}" for alias, spec in (isolated or {}).items()]
        arguments += [*options, "control=yes"] if control else [*options]
        paths = [*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])]
        surroundings = {"XDG_RUNTIME_DIR": str(run), "PYTHONPATH": os.pathsep.join(paths), **(environment or {})}
        super().__init__(arguments, folder.parent / "daemon.log", surroundings)


StartDaemon = Callable[..., RunningDaemon]  # a fixture's: (broker to wait for, control, handlers)


def in_child(function: Callable[[], object], uid: int | None = None, timeout: float = PATIENCE) -> Any:
    """What `function` gives in a forked child, as JSON says it; as another user, if we are root."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reader)
            if uid is not None:
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
            os.write(writer, json.dumps(function()).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    try:
        return _result(reader, timeout)
    finally:
        os.close(reader)
        os.kill(pid, signal.SIGKILL)  # it has ended, or must
        os.waitpid(pid, 0)


def _result(reader: int, timeout: float) -> Any:
    data, deadline = b"", time.monotonic() + timeout
    while select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
        chunk = os.read(reader, 65536)
        if not chunk:
            if not data:
                raise NotInTime("the child has ended without a word")
            return json.loads(data)
        data += chunk
    raise NotInTime(f"the child has said nothing within {timeout} s")

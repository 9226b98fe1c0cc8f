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
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from upcall.client import Client, NoBroker
from upcall.core.errors import UpcallError
from upcall.daemon.plugins import Module
from upcall.daemon.prompting.settings import PromptSettings
from upcall.daemon.settings import DaemonSettings
from upcall.kernel import procfs
from upcall.process.settings import dumps
from upcall.testing.broker import BrokerForTests
from upcall.testing.daemon import DaemonForTests

ONLY_AGENT: Final = DaemonSettings(prompting=PromptSettings(ways=("agent",)))  # it prompts in `upcall prompt` only
_BROKER: Final = BrokerForTests()
_DAEMON: Final = DaemonSettings()
PATIENCE = 60.0  # seconds: time-out for events that take milliseconds on an idle machine
T = TypeVar("T")


class NotInTime(UpcallError):
    """An event that a test waited for has not happened in time."""


def until(look: Callable[[], T | None], what: str, timeout: float = PATIENCE) -> T:
    """Polls `look` and returns its first result that is not None or False. NotInTime after `timeout` seconds. `what`:
    the event, for the error."""
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
    """A Python process with its stderr in a log file. A context manager: its end kills the process."""

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
                ],  # tests find their plugins by PYTHONPATH, also as root
                stdin=subprocess.DEVNULL,
                stderr=file if stderr < 0 else stderr,
                env={**os.environ, **(environment or {})},
            )
        self.pid = self.process.pid

    @property
    def log(self) -> str:
        return self._log.read_text("utf-8", "replace")

    def logged(self, words: str, timeout: float = PATIENCE) -> None:
        """Waits until the log contains `words`. NotInTime."""
        until(lambda: words in self.log, f"{words!r} in the log", timeout)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self) -> None:
        """Sends SIGSTOP and waits until the process has stopped."""
        self.signal(signal.SIGSTOP)
        until(lambda: procfs.stopped(self.pid), "stopped")

    def go_on(self) -> None:
        self.signal(signal.SIGCONT)

    def wait(self, timeout: float = PATIENCE) -> int:
        """Waits for the process's end. Returns its exit status; negative: minus the signal's number. NotInTime."""
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
    """A broker process that serves `folder`. Its constructor returns when it is ready."""

    def __init__(
        self,
        folder: Path,
        stderr: int = -1,
        system: Path | None = None,
        related: bool = False,
        settings: BrokerForTests = _BROKER,
    ) -> None:
        """`system`, `related`: see BrokerForTests. `settings`: others."""
        self.folder = folder
        settings = settings._replace(
            broker=settings.broker._replace(folder=folder), system=system or settings.system, related=related
        )
        arguments = ["-m", "upcall.testing.broker", dumps(settings)]
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
        """Returns the status of this user's daemon as the broker reports it; None without a daemon."""
        found = [one for one in self.status()["daemons"] if one["uid"] == os.getuid()]
        return found[0] if found else None

    def registered(self, pid: int) -> None:
        """Waits until the registered daemon of this user has this pid. NotInTime."""
        until(lambda: (self.daemon() or {}).get("pid") == pid, f"daemon {pid} registered")

    def pending(self, count: int) -> None:
        """Waits until exactly `count` requests to this user's daemon are pending. NotInTime."""
        until(lambda: len((self.daemon() or {"pending": []})["pending"]) == count, f"{count} pending")

    def outcomes(self, service: str = "key") -> dict[str, int]:
        found: dict[str, int] = self.status()["outcomes"].get(service, {})
        return found


class RunningDaemon(Started):
    """A daemon process whose keyring is the folder `keys`. Its constructor does not wait until it is registered: see
    RunningBroker.registered."""

    def __init__(
        self,
        folder: Path,
        keys: Path,
        modules: Mapping[str, str],
        path: Sequence[Path] = (),
        control: bool = False,
        handlers: Sequence[str] = (),
        isolated: Mapping[str, str] | None = None,
        settings: DaemonSettings = _DAEMON,
        environment: Mapping[str, str] | None = None,
        found: Path | None = None,
    ) -> None:
        """`modules`, `isolated` (by alias) and `handlers` are named "package:attribute", and found in `path`, too.
        `settings`: others, for example ONLY_AGENT, or with handlers that are imported when they are first needed.
        `found`: a file from which a reload reads `Discovered`."""
        run = folder.parent / "run"
        run.mkdir(mode=0o700, exist_ok=True)
        given = [Module(alias, spec) for alias, spec in modules.items()]
        given += [Module(alias, spec, isolated=True) for alias, spec in (isolated or {}).items()]
        plugins = settings.plugins._replace(modules=(*settings.plugins.modules, *given))
        daemon = settings._replace(folder=folder, plugins=plugins)
        arguments = [
            "-m",
            "upcall.testing.daemon",
            dumps(DaemonForTests(keys, daemon, control, tuple(handlers), found)),
        ]
        paths = [*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])]
        surroundings = {"XDG_RUNTIME_DIR": str(run), "PYTHONPATH": os.pathsep.join(paths), **(environment or {})}
        super().__init__(arguments, folder.parent / "daemon.log", surroundings)


StartDaemon = Callable[..., RunningDaemon]  # a fixture's: (broker to wait for, control, handlers)


class ChildFailed(Exception):
    """The function raised in the child, or ended it."""


_FAILED: Final = b"\0"  # begins no JSON


def in_child(function: Callable[[], object], uid: int | None = None, timeout: float = 2 * PATIENCE) -> Any:
    """Returns what `function` returns in a forked child, passed on as JSON. `uid`: runs it as that user; root only.

    ChildFailed with the child's traceback; NotInTime after `timeout` seconds, which are more than `function` waits for
    itself."""
    _let_threads_leave()
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
        except BaseException:  # noqa: BLE001 - this is a copy of the test's process, which must not go on here
            os.write(writer, _FAILED + traceback.format_exc().encode("utf-8", "backslashreplace"))
        finally:
            os._exit(status)
    os.close(writer)
    try:
        return _result(reader, timeout)
    finally:
        os.close(reader)
        os.kill(pid, signal.SIGKILL)  # it has ended, or hangs
        os.waitpid(pid, 0)


def _let_threads_leave(timeout: float = 1.0) -> None:
    """Waits until the threads that have ended for Python have left the process, `timeout` seconds at most.

    After `join` a thread still runs the clean-up of C libraries. OpenSSL's holds a lock, which a fork in that instant
    would copy: the child would wait for it for ever. A library's own threads never leave, hence the time-out."""
    end = time.monotonic() + timeout
    while Path("/proc/self/task").stat().st_nlink - 2 > len(sys._current_frames()) and time.monotonic() < end:
        time.sleep(0.001)


def _result(reader: int, timeout: float) -> Any:
    data, deadline = b"", time.monotonic() + timeout
    while select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
        chunk = os.read(reader, 65536)
        if not chunk:
            if not data:
                raise ChildFailed("the child has ended without a word")
            if data.startswith(_FAILED):
                raise ChildFailed(data.removeprefix(_FAILED).decode())
            return json.loads(data)
        data += chunk
    raise NotInTime(f"the child has said nothing within {timeout} s")

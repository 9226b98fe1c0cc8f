"""Provides benchmarks with a temporary folder, processes and keys, and removes them at the end."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

# Imports all code of the daemon before forking: another uid may not be able to read the interpreter.
import upcall.daemon.__main__ as daemon_main
from bench import noop
from upcall.broker.settings import BrokerSettings
from upcall.daemon.plugins import Module, Plugins
from upcall.daemon.settings import DaemonSettings
from upcall.kernel import keyring
from upcall.kernel.process import die_with_parent
from upcall.keys.plugins import load
from upcall.process.settings import dumps
from upcall.protocols.ecryptfs.authtok import AuthTok, pack_auth_tok
from upcall.testing.broker import BrokerForTests

_DAEMON = DaemonSettings()
_ROOT = Path(__file__).resolve().parent.parent
_SOURCES = Path(__file__).resolve().parent / "peer"
_PATIENCE = 20.0  # seconds, the time-out for the start of a process


class BenchError(Exception):
    """A benchmark cannot be run, or its results are wrong."""


class Sample(NamedTuple):
    """The result of one run of a client. Times in microseconds."""

    answered: int
    refused: int
    wrong: int
    p50: float
    p99: float
    p999: float
    wall: float

    @property
    def per_second(self) -> float:
        return self.answered / self.wall * 1e6


def cpu_us(pid: int) -> float:
    """Returns the processor time of all threads of a process in microseconds, by clock_getcpuclockid(3)."""
    return time.clock_gettime_ns((~pid << 3) | 2) / 1000


def pin(pids: Iterable[int], cpus: set[int]) -> None:
    """Pins all threads of these processes to these processors."""
    for pid in pids:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), cpus)


@contextlib.contextmanager
def together(pids: Iterable[int]) -> Iterator[None]:
    """A context in which the processes run on one processor, to compare work without wake-ups between processors."""
    found = list(pids)
    everywhere = os.sched_getaffinity(0)
    pin(found, {max(everywhere)})
    try:
        yield
    finally:
        pin(found, everywhere)


def rss_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text("ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise BenchError(f"process {pid} has no memory")


class Client:
    """A C client (peer/client.c): makes runs on command and reports their results."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process, self.pid = process, process.pid
        self.other = 0  # the pid of its peer

    def ready(self) -> Client:
        self.other = int(self._line().split()[1])
        return self

    def body(self, asked: bytes, expected: bytes, size: int | None = None) -> Client:
        """Sets the request, and the right answer. `size`: of an answer of which `expected` is the beginning."""
        self._tell(f"body {asked.hex()} {expected.hex() or '-'} {len(expected) if size is None else size}")
        self._line()
        return self

    def answers(self) -> list[bytes]:
        """Returns the last answers of the last run, at most 64."""
        self._tell("answers")
        return [bytes.fromhex(answer) for answer in self._line().decode("ascii").split()]

    def run(self, count: int, inflight: int = 1, seconds: float = 5.0) -> Sample:
        """Makes a run. BenchError if any answer was wrong, refused or missing."""
        sample = self.sample(count, inflight, seconds)
        if sample.refused or sample.wrong or not sample.answered:
            raise BenchError(f"not all as it should be: {sample}")
        return sample

    def await_daemon(self) -> Client:
        """Waits until a daemon answers behind the broker."""
        end = time.monotonic() + _PATIENCE
        while self.sample(1, 1, 1.0).refused:
            if time.monotonic() > end:
                raise BenchError("no daemon has registered with the broker")
            time.sleep(0.02)
        return self

    def sample(self, count: int, inflight: int, seconds: float) -> Sample:
        """Makes a run of `count` requests, and accepts any outcome."""
        self._tell(f"run {count} {inflight} {int(seconds * 1000)}")
        answered, refused, wrong, *times = (int(field) for field in self._line(seconds).split())
        p50, p99, p999, wall = (time / 1000 for time in times)
        return Sample(answered, refused, wrong, p50, p99, p999, wall)

    def _tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode("ascii") + b"\n")
        self.process.stdin.flush()

    def _line(self, longer: float = 0.0) -> bytes:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], _PATIENCE + longer)[0]:
            raise BenchError("a client says nothing")
        line = self.process.stdout.readline()
        if not line:
            raise BenchError("a client has ended; its reason is above")
        if line == b"what?\n":
            raise BenchError("a client refuses a command, or its numbers")
        return line


class Stage:
    """A context manager that ends all its processes and removes its keys and folder at the end."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="upcall-bench-"))
        self.folder.chmod(0o755)  # other uids need access to the sockets and programs in it
        self.log = (self.folder / "log").open("ab")
        self._running: dict[int, subprocess.Popen[bytes] | None] = {}
        self._keys: list[tuple[int, int]] = []  # uid, serial
        self._folders = 0

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.end(list(self._running))
            for uid, serial in self._keys:
                self.do_as(uid, lambda serial=serial: keyring.unlink(serial))  # type: ignore[misc]
        finally:
            self.log.close()
            shutil.rmtree(self.folder)

    # --- processes -----------------------------------------------------------------------------------------

    def compile(self) -> None:
        """Compiles the C peers. BenchError if there is no compiler."""
        compiler = shutil.which("cc")
        if compiler is None:
            raise BenchError("there is no C compiler (cc); the peers that we compare with are written in C")
        flags = [compiler, "-O2", "-Wall", "-Wextra", "-Werror"]
        sources = [str(path) for path in sorted(_SOURCES.glob("*.c"))]
        subprocess.run([*flags, "-o", str(self.folder / "peer"), *sources], check=True, timeout=60)
        preload = [str(_SOURCES / "ecryptfsd" / "preload.c"), "-o", str(self.folder / "preload.so")]
        subprocess.run([*flags, "-shared", "-fPIC", *preload], check=True, timeout=60)

    def place(self) -> Path:
        """Makes a folder for one more broker."""
        self._folders += 1
        folder = self.folder / str(self._folders)
        folder.mkdir(mode=0o755)
        return folder

    def start(
        self,
        command: list[str],
        uid: int | None = None,
        talks: bool = False,
        variables: Mapping[str, str] = {},
        inherits: Collection[int] = (),
    ) -> subprocess.Popen[bytes]:
        """Starts a program. `uid`: runs as that user. `talks`: with pipes for stdin and stdout. `variables`: more of
        its environment. `inherits`: descriptors."""
        pipe = subprocess.PIPE if talks else subprocess.DEVNULL
        other = {} if uid in (None, os.geteuid()) else {"user": uid, "group": uid, "extra_groups": []}
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=sys.stderr if talks else self.log, cwd=self.folder,
            preexec_fn=_end_with_parent, env={**os.environ, **self._environment(uid), **variables},
            pass_fds=inherits, **other,  # type: ignore[call-overload]
        )  # fmt: skip
        self._running[process.pid] = process
        return process  # type: ignore[no-any-return]

    def _environment(self, uid: int | None) -> dict[str, str]:
        """Returns an environment with a runtime folder of its own, because two daemons of one uid would conflict."""
        runtime = tempfile.mkdtemp(prefix="run-", dir=self.folder)
        if uid is not None:
            os.chown(runtime, uid, -1)
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        return {"XDG_RUNTIME_DIR": runtime, "PYTHONPATH": path}

    def peer(self, *arguments: object, uid: int | None = None) -> subprocess.Popen[bytes]:
        return self.start([str(self.folder / "peer"), *map(str, arguments)], uid)

    def client(self, *arguments: object, uid: int | None = None) -> Client:
        """Starts a client in C. Call `ready()` next, which waits for its peer."""
        return Client(self.start([str(self.folder / "peer"), *map(str, arguments)], uid, talks=True))

    def broker(self, folder: Path, subuid: Path | None = None) -> int:
        """Starts upcall's broker; returns its pid. `subuid`: replaces /etc/subuid."""
        module, settings = "upcall.broker", dumps(BrokerSettings(folder))
        if subuid is not None:
            module = "upcall.testing.broker"
            settings = dumps(BrokerForTests(BrokerSettings(folder), related=True, subuid=subuid))
        process = self.start([sys.executable, "-m", module, settings])
        self.await_file(folder / "registration.sock", process.pid)
        return process.pid

    def daemon(self, folder: Path, modules: Mapping[str, str], settings: DaemonSettings = _DAEMON) -> int:
        """Starts upcall's daemon as `upcall daemon` does; returns its pid."""
        settings = settings._replace(folder=folder, plugins=plugins(modules))
        return self.start([sys.executable, "-X", "upcall-environment", "-m", "upcall.daemon", dumps(settings)]).pid

    def daemon_as(self, uid: int, folder: Path, modules: Mapping[str, str]) -> int:
        """Starts a daemon as another uid; returns its pid. By fork, because that uid may not be able to read the
        interpreter."""
        for spec in modules.values():
            load(spec)
        environment = self._environment(uid)

        def work() -> None:
            os.environ.update(environment)
            os.dup2(self.log.fileno(), 2)
            daemon_main.serve_with(DaemonSettings(folder, plugins=plugins(modules)))

        pid = _fork_as(uid, work)
        self._running[pid] = None
        return pid

    def do_as(self, uid: int, work: Callable[[], object]) -> None:
        """Calls a function in a child with that uid and its keyrings."""
        _, status = os.waitpid(_fork_as(uid, work), 0)
        if status:
            raise BenchError(f"what was to be done as uid {uid} failed; its reason is above")

    def await_file(self, path: Path, pid: int) -> None:
        end = time.monotonic() + _PATIENCE
        while not path.exists():
            if time.monotonic() > end or self._ended(pid):
                raise BenchError(f"process {pid} did not start: {self._last_words()}")
            time.sleep(0.01)

    def _last_words(self) -> str:
        return (self.folder / "log").read_text("utf-8", "replace")[-500:]

    def _ended(self, pid: int) -> bool:
        process = self._running[pid]
        return process is not None and process.poll() is not None

    def end(self, pids: Iterable[int]) -> None:
        """Ends processes: by SIGTERM, and by SIGKILL if they have not ended after a time-out."""
        ending = [pid for pid in pids if pid in self._running]
        for number, patience in ((signal.SIGTERM, 4.0), (signal.SIGKILL, 4.0)):
            for pid in ending:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            until = time.monotonic() + patience
            while ending and time.monotonic() < until:
                ending = [pid for pid in ending if not self._reaped(pid)]
                time.sleep(0.005)

    def _reaped(self, pid: int) -> bool:
        process = self._running[pid]
        ended = os.waitpid(pid, os.WNOHANG)[0] == pid if process is None else process.poll() is not None
        if ended:
            del self._running[pid]
            for stream in () if process is None else (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
        return ended

    # --- keys ----------------------------------------------------------------------------------------------

    def add_key(self, signature: str, alias: str = noop.ALIAS, blob: bytes = b"-", uid: int | None = None) -> None:
        """Adds an auth token to the uid's user keyring; the stage removes it at its end."""
        uid = os.geteuid() if uid is None else uid
        reader, writer = os.pipe()
        token = pack_auth_tok(AuthTok(signature, alias, blob))
        self.do_as(uid, lambda: os.write(writer, str(keyring.add_user_key(signature, token)).encode("ascii")))
        self._keys.append((uid, int(os.read(reader, 20))))
        os.close(reader)
        os.close(writer)


def _end_with_parent() -> None:
    """Sets PR_SET_PDEATHSIG, for when the benchmark is killed. In the child, after setting its uid, which resets
    it."""
    die_with_parent(signal.SIGKILL)


def plugins(modules: Mapping[str, str]) -> Plugins:
    """What the daemon is told of key modules: alias -> "package:attribute"."""
    return Plugins(tuple(Module(alias, spec) for alias, spec in modules.items()))


def _fork_as(uid: int, work: Callable[[], object]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if uid != os.geteuid():
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        die_with_parent(signal.SIGKILL)
        work()
        code = 0
    except BaseException:  # noqa: BLE001 - the child must not return into the parent's code
        traceback.print_exc()
    finally:
        os._exit(code)

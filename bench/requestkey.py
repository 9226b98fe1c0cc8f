"""Measures request_key on real kernels: keys of Kerberos CIFS sessions, by upcall and by cifs.upcall alternately.

On the host, `rows` compiles a minimal helper and boots the lab's kernels; in the guest,
`python -m bench.requestkey FOLDER KERNEL REQUESTS ROUNDS` measures and writes JSON.

Only the kernel's CIFS client can request these keys, so each request is a session with a server, made by mounting.
Only the time for which the kernel waits for the key is measured.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Protocol

from bench.rows import QUICK, Effort, Row, compared
from bench.stage import BenchError, Stage, cpu_us
from upcall.protocols.request_key import forwarder
from upcall.testing.lab import LabError, run, why_not
from upcall.testing.lab import stage as guest
from upcall.testing.lab.fileserver import mount_here, request_key_lines, server
from upcall.testing.lab.kerberos import FILE_SERVER, Realm, realm

SOURCES = Path(__file__).resolve().parent / "peer" / "request_key"
PEER = "cifs.upcall"
TIME_LIMIT = 900.0
MEMORY = 3072  # MB, because each mount has an smbd process
REQUESTS, BURSTS = 200, 5
AT_ONCE = 64
BACKLOG = 16  # connections that are broken at a time: smbd's backlog has room for as many new ones
ONE, MANY = 0.7, 0.5  # goals


def rows(_: Stage, effort: Effort) -> Iterator[Row]:
    """Measures in QEMU: from request_key to the instantiated key, one after the other, and many at once."""
    return _rows("qemu", effort)


def uml_rows(_: Stage, effort: Effort) -> Iterator[Row]:
    """Measures the same on User-mode Linux, where Python is ten times as fast, and system calls and processes are
    slower."""
    return _rows("uml", effort)


def _rows(kernel: str, effort: Effort) -> Iterator[Row]:
    group = "requestkey" if kernel == "qemu" else f"requestkey-{kernel}"
    found = _measured(kernel, effort)
    spans = {name: [span * 1e3 for span in one] for name, one in found["spans"].items()}
    for name, figure in (("p50", median), ("p99", _p99)):
        ours, peer = [figure(spans["ours"])], [figure(spans["peer"])]
        yield compared(group, name, "ms", ours, peer, PEER, at_most=ONE, note=HOW[kernel])
    floor, peer = [median(spans["floor"])], [median(spans["peer"])]
    yield compared(group, "p50, if a constant were the answer", "ms", floor, peer, PEER)
    for name, spent in found["spent"].items():
        yield Row(group, f"of ours, processor time of the {name}", "ms", spent * 1e3)
    bursts = {name: [span * 1e3 for span in one] for name, one in found["bursts"].items()}
    failed, ours, peer = found["failed"], bursts["ours"], bursts["peer"]
    note = f"failed between bursts: {failed['between']}; refused by our broker: {failed['refused'] or 'none'}"
    yield compared(group, f"{AT_ONCE} at once, the last one", "ms", ours, peer, PEER, at_most=MANY, note=note)
    yield compared(group, "  if a constant were the answer", "ms", bursts["floor"], [median(bursts["peer"])], PEER)


def _measured(kernel: str, effort: Effort) -> dict[str, Any]:
    """Runs the guest. Returns its results, in seconds. BenchError."""
    if (why := why_not(kernel)) is not None:
        raise BenchError(f"the lab cannot run {kernel} here: {why}")
    requests, rounds = (REQUESTS, BURSTS) if effort.rounds > QUICK.rounds else (REQUESTS // 5, 1)
    with tempfile.TemporaryDirectory(prefix="upcall-bench-") as folder:
        built, results = Path(folder) / "peer", Path(folder) / "results"
        built.mkdir()
        for source in SOURCES.glob("*.c"):
            flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-static"]
            subprocess.run(["cc", *flags, "-o", str(built / source.stem), str(source)], check=True, timeout=60)
        line = [sys.executable, "-P", "-m", "bench.requestkey", str(built), kernel, str(requests), str(rounds)]
        told = {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
        try:
            result = run(
                line, cwd=built, timeout=TIME_LIMIT, results=results, memory=MEMORY, kernel=kernel, env=told
            )  # fmt: skip
        except LabError as error:
            raise BenchError(f"{kernel}: {error}") from error
        if result.returncode or result.kernel_faults:
            said = [*result.stderr.decode("utf-8", "replace").splitlines()[-12:], *result.kernel_faults]
            raise BenchError(f"in the guest ({kernel}): " + "\n".join(said))
        found: dict[str, Any] = json.loads((results / "requestkey.json").read_text())
        return found


HOW = {
    "qemu": "what the kernel waited in cifs_get_spnego_key, by its own probes; at once: as the processes saw it",
    "uml": "from request-key's start to its end, as a process in between saw it",
}


def _p99(spans: Sequence[float]) -> float:
    return quantiles(spans, n=100)[98]


# --- in the guest: clocks ------------------------------------------------------------------------------------


class _Clock(Protocol):
    def spans(self) -> list[float]:
        """Returns the durations of all requests since the last call, in seconds."""
        ...


class _Probes:
    """Measures by kprobes on the kernel's function."""

    _FOLDER = Path("/sys/kernel/tracing")
    _FUNCTION = "cifs_get_spnego_key"
    _LINE = re.compile(r" (\d+\.\d+): (bench_(?:in|out)): \(.*?\)(?: key=(-?\d+))?$", re.MULTILINE)

    def __init__(self) -> None:
        subprocess.run(["mount", "-t", "tracefs", "none", self._FOLDER], check=True)
        (self._FOLDER / "trace_clock").write_text("mono")
        (self._FOLDER / "kprobe_events").write_text(
            f"p:bench_in {self._FUNCTION}\nr:bench_out {self._FUNCTION} key=$retval:s64\n"
        )
        for event in ("bench_in", "bench_out"):
            (self._FOLDER / "events/kprobes" / event / "enable").write_text("1")

    def spans(self) -> list[float]:
        events = self._LINE.findall((self._FOLDER / "trace").read_text())
        (self._FOLDER / "trace").write_text("")
        if [event for _, event, _ in events] != ["bench_in", "bench_out"] * (len(events) // 2):
            raise RuntimeError(f"requests did not come one after the other: {events[:8]}")
        if failed := [int(key) for _, event, key in events if event == "bench_out" and -4096 < int(key) < 0]:
            raise RuntimeError(f"the kernel got no key: {failed[:8]}")
        return [float(end[0]) - float(begin[0]) for begin, end in zip(events[::2], events[1::2], strict=True)]


class _Gate:
    """Measures by peer/request_key/gate.c in place of request-key; the gate can hold requests back."""

    _PROGRAM, _REAL = Path("/sbin/request-key"), Path("/sbin/request-key.real")
    _LOCK, _SPANS = Path("/run/gate"), Path("/run/gate.spans")

    def __init__(self, built: Path) -> None:
        self.failed_between = 0  # failed requests between two bursts, while connections are made again
        self._PROGRAM.rename(self._REAL)
        self._SPANS.touch()
        self._lock = os.open(self._LOCK, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC)
        shutil.copy(built / "gate", self._PROGRAM)

    def shut(self) -> None:
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    @property
    def waiting(self) -> int:
        """The number of requests that wait at the gate."""
        return Path("/proc/locks").read_text().count("-> FLOCK")

    def open_and_wait(self) -> float:
        """Opens the gate. Returns the seconds until the last waiting request has its key."""
        waiting = self.waiting
        self.failed_between += sum(status != 0 for _, _, status in self._noted())
        begun = time.monotonic()
        fcntl.flock(self._lock, fcntl.LOCK_UN)
        guest.wait_until(lambda: self._SPANS.read_bytes().count(b"\n") >= waiting, "the last key", 60)
        return max(ended for _, ended in self._taken()) - begun

    def spans(self) -> list[float]:
        return [ended - begun for begun, ended in self._taken()]

    def _taken(self) -> list[tuple[float, float]]:
        """Returns (begun, ended) of all requests since the last call."""
        found = self._noted()
        if failed := [status for _, _, status in found if status]:
            raise RuntimeError(f"request-key failed: {failed[:8]}; the broker: {_refused()}")
        return [(begun / 1e9, ended / 1e9) for begun, ended, _ in found]

    def _noted(self) -> list[list[int]]:
        """Returns the lines since the last call: begun, ended, status."""
        found = [[int(word) for word in line.split()] for line in self._SPANS.read_text().splitlines()]
        os.truncate(self._SPANS, 0)
        return found


def _refused() -> dict[str, int]:
    """Returns reason -> number of keys that upcall's broker refused."""
    counts = (guest.broker_status() or {}).get("request_key", {})
    return {reason: count for reason, count in counts.items() if reason != "answered"}


# --- in the guest: requests ----------------------------------------------------------------------------------

HOSTS = {"ours": FILE_SERVER, "peer": "peer.lab.test", "floor": "floor.lab.test"}  # names of the same server
_MOUNT = Path("/tmp/bench.cifs")


def _lines(built: Path, every: str | None = None) -> list[str]:
    """Returns request-key's lines: the program for each of the server's names. `every`: one program for all names."""
    programs = {
        "ours": " ".join(forwarder.command()),
        "peer": "/usr/sbin/cifs.upcall",
        "floor": str(built / "floor"),
    }
    nowhere = "create dns_resolver * * /bin/keyctl negate %k 3600 %S"  # there is no name server: fails at once
    if every is not None:
        return [nowhere, f"create cifs.spnego * * {programs[every]} %k"]
    return [nowhere, *(f"create cifs.spnego ver=0x2;host={HOSTS[name]};* * {programs[name]} %k" for name in HOSTS)]


def _options(who: guest.Person, *others: str) -> list[str]:
    return [f"user={who.name}", f"cruid={who.uid}", f"uid={who.uid}", *others]


def _mount(who: guest.Person, name: str) -> None:
    """Makes and ends a session of this user with the server. The server refuses sessions with keys of `floor`."""
    try:
        mount_here(_MOUNT, *_options(who), host=HOSTS[name])
    except OSError:
        if name != "floor":
            raise
    else:
        guest.unmount(_MOUNT)


def _one_by_one(who: guest.Person, clock: _Clock, requests: int) -> dict[str, list[float]]:
    order = []
    clock.spans()
    for number in range(requests):
        for name in list(HOSTS) if number % 2 == 0 else reversed(list(HOSTS)):
            _mount(who, name)
            order.append(name)
    found: dict[str, list[float]] = {name: [] for name in HOSTS}
    for name, span in zip(order, clock.spans(), strict=True):
        found[name].append(span)
    return found


@contextlib.contextmanager
def _connected(who: guest.Person, names: Sequence[str]) -> Iterator[None]:
    """A context with connections to the server that later sessions share, so that requests need no new smbd
    process."""
    with contextlib.ExitStack() as stack:
        for name in names:
            place = Path(f"{_MOUNT}.{name}")
            mount_here(place, *_options(who), host=HOSTS[name])
            stack.callback(guest.unmount, place)
        yield


@contextlib.contextmanager
def _many(who: guest.Person) -> Iterator[None]:
    """A context with many mounts, each with a connection and a session of its own."""
    with contextlib.ExitStack() as stack:
        for number in range(AT_ONCE):
            place = Path(f"{_MOUNT}.{number}")
            mount_here(place, *_options(who, "nosharesock", "echo_interval=10"))  # retries what is stuck
            stack.callback(guest.unmount, place)
        yield


def _burst(gate: _Gate) -> float:
    """Breaks all connections, which the kernel then makes again. Returns the seconds until the last request has its
    key."""
    guest.wait_until(lambda: len(_serving()) == AT_ONCE and not _broken(), "sessions", 90)
    gate.shut()
    for number, pid in enumerate(_serving(), 1):
        with contextlib.suppress(ProcessLookupError):  # it has ended already, and broken its connection
            os.kill(pid, signal.SIGTERM)
        if number % BACKLOG == 0:
            guest.wait_until(lambda: gate.waiting >= number, f"{number} requests at the gate", 90)  # noqa: B023
    with _stopped("smbd"):  # otherwise it would use the processor for sessions that have a key
        return gate.open_and_wait()


def _serving() -> list[int]:
    """Returns the pids of the smbd processes with a client: children of the first one."""
    found = _processes("smbd")
    return [pid for pid, parent in found.items() if parent in found]


def _broken() -> bool:
    return "DISCONNECTED" in Path("/proc/fs/cifs/DebugData").read_text()


def _processes(name: str) -> dict[int, int]:
    """Returns pid -> parent's pid of all processes with this name."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            before, _, rest = path.read_text().rpartition(") ")
            pid, _, comm = before.partition(" (")
            if comm == name:
                found[int(pid)] = int(rest.split()[1])
    return found


@contextlib.contextmanager
def _stopped(program: str) -> Iterator[None]:
    found = _processes(program)
    for pid in found:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in found:
            os.kill(pid, signal.SIGCONT)


def _bursts(built: Path, gate: _Gate, rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"ours": [], "peer": []}
    for number in range(rounds):
        for name in list(found) if number % 2 == 0 else reversed(list(found)):
            with request_key_lines(*_lines(built, name)):
                found[name].append(_burst(gate))
        print(f"burst {number + 1} of {rounds}", file=sys.stderr, flush=True)
    with request_key_lines(*_lines(built, "floor")):  # last, because the server refuses these sessions
        found["floor"] = [_burst(gate)]
    return found


def _realm_for_all(lab: Realm) -> None:
    for host in HOSTS.values():
        if host != FILE_SERVER:
            lab.administer(
                f"add_principal -randkey cifs/{host}", f"ktadd -norandkey -k {lab.server_keytab} cifs/{host}"
            )


def main(built: Path, kernel: str, requests: int, rounds: int) -> None:
    """Measures in the guest, and writes the results."""
    alice, bob = guest.person("alice"), guest.person("bob")
    with realm() as lab:
        _realm_for_all(lab)
        with server(lab, encrypt="off"):
            _measure(built, kernel, requests, rounds, lab, alice, bob)


def _measure(
    built: Path, kernel: str, requests: int, rounds: int, lab: Realm,
    alice: guest.Person, bob: guest.Person,
) -> None:  # fmt: skip
    for who in (alice, bob):
        lab.login(who)
    broker, daemon = guest.start_broker(), guest.start_daemon(alice)
    with request_key_lines(*_lines(built, "peer")), _connected(bob, list(HOSTS)):
        gate = _Gate(built) if kernel == "uml" else None
        clock = gate or _Probes()
        with request_key_lines(*_lines(built)):
            for name in itertools.chain(*[HOSTS] * 3):
                _mount(alice, name)  # warm-up: obtains tickets, loads handlers and files
            servers = {"broker": broker.pid, "daemon": daemon.pid}
            before = {name: cpu_us(pid) for name, pid in servers.items()}
            spans = _one_by_one(alice, clock, requests)
            spent = {name: (cpu_us(pid) - before[name]) / 1e6 / requests for name, pid in servers.items()}
    gate = gate or _Gate(built)
    with request_key_lines(*_lines(built, "ours")), _many(alice):
        gate.spans()
        bursts = _bursts(built, gate, rounds)
    failed = {"between": gate.failed_between, "refused": _refused()}
    found = {"spans": spans, "spent": spent, "bursts": bursts, "failed": failed}
    Path(os.environ["UPCALL_LAB_RESULTS"], "requestkey.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:5]))

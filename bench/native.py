"""Measures upcall and ecryptfsd natively, below the same played kernel.

No eCryptfs in the kernel is needed: a client in C (peer/device.c) makes the requests that fs/ecryptfs makes, and
checks each answer. A preloaded library (peer/ecryptfsd/preload.c) gives its socket to the server that opens
/dev/ecryptfs. Both servers have the same key, in the user keyring and in a PEM file under a passphrase. upcall is
hardened as usual.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from bench import ecryptfsd, packets
from bench.conditions import Series
from bench.rows import Effort, Row, by_turns, compared
from bench.stage import BenchError, Client, Stage, cpu_us
from upcall import client as requester
from upcall.broker.settings import BrokerSettings
from upcall.keymodule import KeyHandle, Limits, Making
from upcall.process.settings import dumps
from upcall.protocols.ecryptfs.device import DEVICE
from upcall.protocols.ecryptfs.packets import CIPHER_AES_128
from upcall.testing.lab import LabError
from upcall.testing.secrets import GivenSecrets

_ALIAS, _SPEC = "openssl", "upcall_rsa:module"
_BITS = 2048
_PASSPHRASE = b"correct horse 16"
_INFLIGHT = (1, 8)
_NEWER, _OLDER = "OpenSSL 3", "OpenSSL 1.1.1"
# Goals for requests per second.
_GOALS = {
    _NEWER: {"create x1": 7.0, "open x1": 4.0, "create x8": 16.0, "open x8": 9.0},
    _OLDER: {"create x1": 1.0, "open x1": 2.5, "create x8": 1.8, "open x8": 5.5},
}
# Rounds are many and short, so that a drift of the processor's speed affects both sides of each ratio.
_ROUNDS, _SECONDS = 3, 0.25  # of each round, and of each second of the effort


class _Figures(NamedTuple):
    """The results of one round."""

    per_second: float
    p50: float
    p99: float
    p999: float
    cpu: float  # processor time per request of all processes of the server, in microseconds


_TITLES = {
    "per_second": ("requests per second", "/s"),
    "p50": ("  p50", "us"),
    "p99": ("  p99", "us"),
    "p999": ("  p99.9", "us"),
    "cpu": ("  processor time per request", "us"),
}


class _Work(NamedTuple):
    """A request, and how its answer begins and how long it is."""

    asked: bytes
    expected: bytes
    size: int


class _Key(NamedTuple):
    signature: str
    handle: KeyHandle
    clear: bytes  # a file key

    def works(self) -> dict[str, _Work]:
        """Returns what the kernel asks when a file is created, and when one is opened that is not cached."""
        wrapped = self.handle.wrap(self.clear)
        create, begins = packets.wrap(self.signature, self.clear, wrapped)
        opening, right = packets.unwrap(self.signature, self.clear, wrapped)
        # Each wrap is another one (PKCS #1's padding is random), so only its length is known.
        head = len(begins) - len(wrapped)
        return {
            "create": _Work(create, begins[:head], len(begins)),
            "open": _Work(opening, right, len(right)),
        }

    def check_wraps(self, answers: list[bytes], head: int) -> None:
        for answer in answers:
            if self.handle.unwrap(answer[head:]) != self.clear:
                raise BenchError("a wrapped key does not unwrap to the file key")


class _Server(NamedTuple):
    """The played kernel and the processes that answer it."""

    kernel: Client
    pids: tuple[int, ...]

    def measure(self, key: _Key, work: _Work, inflight: int, seconds: float) -> _Figures:
        self.kernel.run(20, inflight, 1.0)  # wakes the processes of this side
        before = sum(map(cpu_us, self.pids))
        sample = self.kernel.run(10_000_000, inflight, seconds)
        used = sum(map(cpu_us, self.pids)) - before
        if work.size != len(work.expected):
            key.check_wraps(self.kernel.answers(), len(work.expected))
        return _Figures(sample.per_second, sample.p50, sample.p99, sample.p999, used / sample.answered)


def rows(stage: Stage, effort: Effort) -> Iterator[Row]:
    """Measures what the kernel asks for when files are created and opened, one request after the other and eight at
    once."""
    try:
        built = ecryptfsd.build(stage.folder / "ecryptfsd")
    except LabError as error:
        raise BenchError(str(error)) from error
    folder, why_not = older(built)
    key = _new_key(stage)
    hardened, ours = _ours(stage)
    servers = {"ours": ours, _NEWER: _peer(stage, built, built / ecryptfsd.MODULE)}
    if folder is not None:
        libraries = folder / ecryptfsd.LIBRARIES
        servers[_OLDER] = _peer(stage, built, folder / ecryptfsd.MODULE, libraries)
    found = _measured(servers, key, effort)
    for peer, goals in _GOALS.items():
        group = f"ecryptfsd with {peer}, natively, RSA-{_BITS}"
        if peer not in servers:
            yield Row(group, "not measured", "", None, note=why_not)
            continue
        for what, goal in goals.items():
            for field, (title, unit) in _TITLES.items():
                mine, theirs = (found[what][name].map(attrgetter(field)) for name in ("ours", peer))
                wanted = goal if field == "per_second" else None
                name = f"{what}, {title}" if wanted else title
                yield compared(group, name, unit, mine, theirs, "ecryptfsd", at_least=wanted, note=hardened)
    stage.end(pid for server in servers.values() for pid in (server.kernel.pid, *server.pids))


def _measured(servers: Mapping[str, _Server], key: _Key, effort: Effort) -> dict[str, dict[str, Series[_Figures]]]:
    """Returns the figures of each round: of what -> of which server."""
    found = {}
    for title, work in key.works().items():
        for server in servers.values():
            server.kernel.body(*work).run(100, max(_INFLIGHT))
        for inflight in _INFLIGHT:
            contenders = {
                name: partial(server.measure, key, work, inflight, effort.seconds * _SECONDS)
                for name, server in servers.items()
            }
            found[f"{title} x{inflight}"] = by_turns(contenders, effort.rounds * _ROUNDS)
    return found


def older(built: Path) -> tuple[Path | None, str]:
    """Builds with OpenSSL 1.1.1. Returns the folder; or None, and why."""
    try:
        return ecryptfsd.build_older(built), ""
    except LabError as error:
        return None, f"{_OLDER} cannot be had: {' '.join(str(error).split())}"


def _new_key(stage: Stage) -> _Key:
    """Makes a key and its file as ecryptfs-manager does: the passphrase is in the key's blob in the user keyring."""
    from upcall_rsa import COMPAT, module

    path = stage.folder / "key.pem"
    path.touch(0o600)
    path.write_bytes(ecryptfsd.new_key(_PASSPHRASE, _BITS))
    made = module.import_key(Making(path, {}, bytearray(_PASSPHRASE), COMPAT, Limits(), GivenSecrets()))
    stage.add_key(made.signature, _ALIAS, made.blob)
    handle = module.open(made.signature, made.blob, GivenSecrets())
    return _Key(made.signature, handle, packets.new_file_key(CIPHER_AES_128))


def _kernel(stage: Stage) -> tuple[Client, socket.socket]:
    """Starts a played kernel. Returns it and the server's end of its socket."""
    mine, servers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with mine:
        command = [str(stage.folder / "peer"), "drive-device", str(mine.fileno())]
        kernel = Client(stage.start(command, talks=True, inherits=[mine.fileno()]))
    return kernel.ready(), servers


def _start(stage: Stage, command: list[str], device: socket.socket, variables: Mapping[str, str]) -> int:
    """Starts a server, whose /dev/ecryptfs is `device`."""
    preloaded = {"LD_PRELOAD": str(stage.folder / "preload.so"), "BENCH_DEVICE": str(device.fileno())}
    return stage.start(command, variables={**preloaded, **variables}, inherits=[device.fileno()]).pid


def _peer(stage: Stage, built: Path, module: Path, *libraries: Path) -> _Server:
    """Starts ecryptfsd with one key module. `libraries`: folders with more than its own libraries."""
    kernel, device = _kernel(stage)
    modules = stage.place()  # which has nothing else, because ecryptfsd loads whatever is there
    (modules / module.name).symlink_to(module)
    folders = [*libraries, built / ecryptfsd.LIBRARIES, built / "lib/x86_64-linux-gnu"]
    variables = {"LD_LIBRARY_PATH": os.pathsep.join(map(str, folders)), "BENCH_KEY_MODULES": str(modules)}
    with device:
        return _Server(kernel, (_start(stage, [str(built / "usr/bin/ecryptfsd"), "-f"], device, variables),))


def _ours(stage: Stage) -> tuple[str, _Server]:
    """Starts broker and daemon. Returns their privilege dropping in words, and them."""
    kernel, device = _kernel(stage)
    folder = stage.place()
    settings = dumps(BrokerSettings(folder, device=DEVICE))
    with device:
        broker = _start(stage, [sys.executable, "-m", "upcall.broker", settings], device, {})
    stage.await_file(folder / "registration.sock", broker)
    daemon = stage.daemon(folder, {_ALIAS: _SPEC})
    return _hardening(folder), _Server(kernel, (broker, daemon))


def _hardening(folder: Path) -> str:
    with requester.Client(folder) as client:
        hardening = client.status()["broker"]["hardening"]
    return f"our broker: seccomp {hardening['seccomp']}, Landlock {hardening['landlock']}"

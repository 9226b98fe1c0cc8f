"""Runs the forwarder (compiled with sanitizers, or the stand-in) with a simulated kernel and broker."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from upcall.core.messages import Answer, Refusal
from upcall.protocols.request_key import forwarder
from upcall.protocols.request_key.forwarder import build
from upcall.wire.envelope import MAX_MESSAGE, Envelope, pack_response, take_request

HERE = Path(__file__).parent
SOURCES = Path(forwarder.__file__).parent
SANITIZED = ["-std=c11", "-g", "-O1", "-Werror", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
PATIENCE = 60.0  # seconds: time-out for events that are immediate on an idle machine
KEY = 123456789


def compiled(target: Path, *sources: Path) -> Path | None:
    """Compiles with sanitizers; warnings are errors. Returns the program's path; None without a compiler."""
    words = build.compiler()
    if words is None:
        return None
    command = [*words, *build.WARNINGS, *SANITIZED, f"-I{SOURCES}", "-o", str(target), *map(str, sources)]
    subprocess.run(command, check=True, timeout=build.TIME_LIMIT)
    return target


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="upcall-forwarder-"))
    atexit.register(shutil.rmtree, folder)
    return folder


@functools.cache
def played_program() -> Path | None:
    sources = (SOURCES / "forward.c", SOURCES / "decide.c", HERE / "played_host.c")
    return compiled(_folder() / "program", *sources)


@functools.cache
def decider() -> Path | None:
    return compiled(_folder() / "decider", SOURCES / "decide.c", HERE / "decider.c")


def played_words(kind: str) -> list[str] | None:
    """Returns the command for the forwarder of this kind, "c" or "stand-in", with a simulated host. None if it cannot
    be compiled."""
    if kind == "c":
        program = played_program()
        return None if program is None else [str(program)]
    return [sys.executable, "-I", "-S", str(HERE / "played_standin.py"), str(SOURCES / "standin.py")]


class Ended(NamedTuple):
    code: int
    out: str
    err: str
    calls: list[str]  # its calls to the kernel, after assuming the authority

    @property
    def answer(self) -> str:
        """The call that answered the key."""
        return self.calls[-1]


class Play:
    """A run of the forwarder: its folder, its command, and the simulated kernel's data."""

    def __init__(self, folder: Path, words: Sequence[str], described: bytes, callout: bytes = b"") -> None:
        self.folder, self._words = folder, list(words)
        self.write("describe", described)
        self.write("callout", callout)
        self.write("uid", str(os.getuid()).encode())
        self.write("gone", b"0")
        self.socket = folder / "broker"
        self.log = folder / "log"

    def write(self, name: str, content: bytes) -> None:
        (self.folder / name).write_bytes(content)

    def fail(self, call: str, code: int) -> None:
        self.write(f"fail-{call}", str(code).encode())

    def start(self, *arguments: object, **how: Any) -> subprocess.Popen[str]:
        """Starts it with these arguments; without any, with the socket and the key. `how`: see `start_with`."""
        return self.start_with(arguments or ("-s", self.socket, KEY), **how)

    def start_with(
        self, arguments: Sequence[object], before: Callable[[], None] | None = None, keep: Sequence[int] = ()
    ) -> subprocess.Popen[str]:
        """Starts it. `before`: runs in the child before exec. `keep`: descriptors that it inherits."""
        words = [*self._words, *map(str, arguments)]
        return subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/",
            env={"UPCALL_PLAY": str(self.folder), "ASAN_OPTIONS": "detect_leaks=0"}, preexec_fn=before, pass_fds=keep,
        )  # fmt: skip

    def end(self, process: subprocess.Popen[str]) -> Ended:
        out, err = process.communicate(timeout=PATIENCE)
        return Ended(process.returncode, out, err, self.calls())

    def run(self, *arguments: object) -> Ended:
        return self.end(self.start(*arguments))

    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def await_call(self, call: str) -> None:
        end = time.monotonic() + PATIENCE
        while call not in self.calls():
            assert time.monotonic() < end, f"the forwarder has not come to {call}"
            select.select([], [], [], 0.005)


class PlayedBroker:
    """A broker that sends what the test specifies, to one forwarder."""

    def __init__(self, path: Path, backlog: int = 5) -> None:
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listening.settimeout(PATIENCE)
        self._listening.bind(str(path))
        self._listening.listen(backlog)
        self.connection: socket.socket | None = None

    def fileno(self) -> int:
        """Readable while a connection waits to be accepted."""
        return self._listening.fileno()

    def accept(self) -> socket.socket:
        accepted = self._listening.accept()[0]
        accepted.settimeout(PATIENCE)
        return accepted

    def request(self) -> Envelope:
        self.connection = self.accept()
        return take_request(self.connection.recv(MAX_MESSAGE))

    def send(self, data: bytes) -> None:
        assert self.connection is not None
        self.connection.send(data)

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
        self._listening.close()


@contextlib.contextmanager
def playing(path: Path, backlog: int = 5) -> Iterator[PlayedBroker]:
    broker = PlayedBroker(path, backlog)
    try:
        yield broker
    finally:
        broker.close()


def answered(payload: bytes, expiry: int = 0, seq: int = KEY) -> bytes:
    """Returns an answer that is valid except for its payload, whose size may be wrong."""
    return pack_response(seq, 0, Answer(struct.pack("=I", expiry) + payload))


def refused(code: int, reason: str = "no-key", seq: int = KEY) -> bytes:
    return pack_response(seq, 0, Refusal(reason, code))


# --- payloads ----------------------------------------------------------------------------------------------------

SPNEGO = b"cifs.spnego;0;0;39010000;ver=0x2;host=fs.lab.test;ip4=127.0.0.1;sec=krb5;uid=0x0;creduid=0x3e9;pid=0x164"
DNS = b"dns_resolver;0;0;39010000;fs.lab.test"


def spnego(key: int = 16, blob: int = 32) -> bytes:
    return struct.pack("<IIII", 2, 0, key, blob) + bytes(range(key)) + b"\x60" * blob


def server(name: bytes = b"afs1.lab.test", addresses: Sequence[bytes] = (b"\x7f\0\0\1", bytes(16))) -> bytes:
    records = b"".join(bytes([len(address) == 16]) + address for address in addresses)
    return struct.pack("<HHHHBBBB", len(name), 1, 2, 7003, 4, 1, 1, len(addresses)) + name + records


def servers(*records: bytes, count: int | None = None) -> bytes:
    return bytes([0, 0, 1, 4, 1, len(records) if count is None else count]) + b"".join(records)

"""Implements a key module that harms its process as foreign libraries can: its auth token is "verb argument"."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

from upcall.core.errors import ModuleFailed, Refused
from upcall.keymodule import API, Secrets

SECRET = "correct-horse-battery-staple"
MASK = 0x5A
LEAKED: list[bytes] = []


def mixed(data: bytes) -> bytes:
    return bytes(byte ^ MASK for byte in data)


def gate(path: str) -> None:
    """Reports its arrival to the test's gate, and waits for its release."""
    with socket.socket(socket.AF_UNIX) as there:
        there.connect(path)
        there.recv(1)


class Key:
    """Executes its verb on each wrap, then wraps; on unwrap only if the verb is "unwrap"."""

    def __init__(self, verb: str, argument: str, secrets: Secrets) -> None:
        self._verb, self._argument, self._secrets = verb, argument, secrets

    def wrap(self, key: bytes, /) -> Any:
        act = getattr(self, f"_{self._verb}", None)
        given = act() if act else None
        return mixed(key) if given is None else given

    def unwrap(self, wrapped: bytes, /) -> bytes:
        return mixed(wrapped)

    def export_public(self) -> bytes:
        return str(os.getpid()).encode()

    def close(self) -> None:
        if self._verb == "close_marks":
            Path(self._argument).touch()

    def _abort(self) -> NoReturn:
        os.abort()

    def _segv(self) -> None:
        ctypes.string_at(0)

    def _exit_now(self) -> NoReturn:
        os._exit(0)

    def _abort_at_gate(self) -> NoReturn:
        gate(self._argument)
        os.abort()

    def _gate(self) -> None:
        gate(self._argument)

    def _hang(self) -> None:
        threading.Event().wait()

    def _hang_with_everything(self) -> None:
        """Blocks while holding the GIL: no other thread of the process can run."""
        ctypes.PyDLL(None).pause()

    def _stop(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)
        threading.Event().wait()  # until SIGSTOP has stopped all threads

    def _hang_or_not(self) -> None:
        if Path(self._argument).exists():
            threading.Event().wait()

    def _abort_or_not(self) -> None:
        if Path(self._argument).exists():
            os.abort()

    def _leak_descriptors(self) -> None:
        for _ in range(1000):
            os.open("/dev/null", os.O_RDONLY)

    def _leak_memory(self) -> None:
        while True:
            LEAKED.append(bytes(range(256)) * (1 << 12))

    def _scribble(self) -> None:
        """Writes garbage to all open descriptors, including the socket."""
        for fd in range(3, 64):
            with contextlib.suppress(OSError):
                os.write(fd, os.urandom(100))

    def _shout(self) -> None:
        print(SECRET, file=sys.stderr, flush=True)
        print(SECRET, flush=True)
        os.write(2, SECRET.encode())

    def _fork(self) -> None:
        """Forks a child that returns into the caller, as if it were the module."""
        if os.fork():
            os.wait()

    def _fork_and_stay(self) -> None:
        """Leaves a process behind that has inherited all descriptors."""
        pid = int(ctypes.CDLL(None).fork())
        if pid == 0:
            time.sleep(60)
            os._exit(0)
        Path(self._argument).write_text(str(pid))
        os.abort()

    def _raise(self) -> NoReturn:
        raise RuntimeError(SECRET)

    def _leave(self) -> NoReturn:
        raise SystemExit(SECRET)

    def _fail(self) -> NoReturn:
        raise ModuleFailed("the card was pulled out \u2014 \udcff")

    def _refuse(self) -> NoReturn:
        raise Refused("locked")

    def _text(self) -> str:
        return "text"

    def _huge(self) -> bytes:
        return bytes(1 << 20)

    def _passphrase(self) -> bytes:
        return bytes(self._secrets.passphrase(self._argument))

    def _pin(self) -> bytes:
        pin = self._secrets.pin("token", "PIN \u2014")
        self._secrets.verdict("token", pin == b"1234")
        self._secrets.touch("token", "touch it")
        return bytes(pin)

    def _pin_elsewhere(self) -> bytes:
        said: list[str] = []

        def work() -> None:
            try:
                self._secrets.pin("token", "")
            except Refused as refused:
                said.append(refused.reason)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return said[0].encode()

    def _environment(self) -> bytes:
        """Returns a description of the process's environment."""
        status = Path("/proc/self/status").read_text()
        found = [line for line in status.splitlines() if line.startswith("NoNewPrivs")]
        dumpable = ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)
        links = [os.readlink(f"/proc/self/fd/{fd}") for fd in range(3)]
        limits = Path("/proc/self/limits").read_text().splitlines()
        found += [" ".join(line.split()) for line in limits if "core file" in line or "open files" in line]
        return "\n".join([*found, f"dumpable {dumpable}", *links]).encode()


class Watching(Key):
    def stale(self) -> bool:
        return not Path(self._argument).exists()


class Module:
    name = "violent"
    api = API

    def open(self, signature: str, blob: bytes, secrets: Secrets, /) -> Any:
        verb, _, argument = blob.decode().partition(" ")
        if verb == "open_abort":
            os.abort()
        if verb == "open_raise":
            raise RuntimeError(SECRET)
        if verb == "open_none":
            return None
        return (Watching if verb == "watching" else Key)(verb, argument, secrets)


VIOLENT = Module()

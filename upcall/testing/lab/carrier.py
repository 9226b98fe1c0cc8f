"""Forwards the guest's streams to their consumers while the machine runs.

One event loop: the guest's ports are sockets, a pidfd reports the end of QEMU, and the time limit is the loop's."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping

from .ending import MarkedStream
from .errors import LabTimedOut
from .terminal import PseudoTerminal

CHUNK = 1 << 16
REST_PATIENCE = 20.0  # seconds without data, after the command's end, until a stream counts as ended

Sink = Callable[[bytes], object]


class Carrier:
    """Forwards streams. `sinks`: port's name -> function that receives its data. `deadline`: seconds of
    CLOCK_MONOTONIC, or None.

    Afterwards `returncode` is the command's exit code, None if the machine ended first. `ready_at`: when the command
    started."""

    def __init__(
        self, mark: bytes, sinks: Mapping[str, Sink], deadline: float | None, terminal: PseudoTerminal | None = None
    ) -> None:
        self._sinks = sinks
        self._streams = {name: MarkedStream(mark) for name in sinks}
        self._deadline = deadline
        self._terminal = terminal
        self._control = b""
        self.ready_at: float | None = None
        self.returncode: int | None = None

    def carry(self, process: subprocess.Popen[bytes], ports: Mapping[str, socket.socket]) -> None:
        """Blocks until the command has ended and all its output was received, or the machine has ended.

        LabTimedOut at the deadline; exceptions of sinks."""
        with self._watching(process, ports) as readiness:
            while self.returncode is None or not all(stream.complete for stream in self._streams.values()):
                events = readiness.select(self._patience())
                arrived = [key for key, _ in events if key.data != "ended"]
                if events and not arrived:
                    break  # the machine has ended, and all data was read
                if not events and self.returncode is not None:
                    break  # the kernel's log may lack its end if it was too long
                for key in arrived:
                    self._serve(readiness, key, ports)
        for name, stream in self._streams.items():
            self._sinks[name](stream.rest())
        with contextlib.suppress(OSError):
            ports["control"].sendall(b"done\n")

    @contextlib.contextmanager
    def _watching(
        self, process: subprocess.Popen[bytes], ports: Mapping[str, socket.socket]
    ) -> Iterator[selectors.BaseSelector]:
        ended = os.pidfd_open(process.pid)
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, ended)
            readiness = stack.enter_context(selectors.DefaultSelector())
            readiness.register(ended, selectors.EVENT_READ, "ended")
            for name, port in ports.items():
                readiness.register(port, selectors.EVENT_READ, name)
            if self._terminal:
                stack.enter_context(self._terminal.raw())
                readiness.register(self._terminal.descriptor, selectors.EVENT_READ, "keyboard")
            yield readiness

    def _patience(self) -> float | None:
        if self._deadline is None:
            return None
        left = self._deadline - time.monotonic()
        if left <= 0 and self.returncode is None:
            booted = "the command had not ended" if self.ready_at else "the machine had not even booted"
            raise LabTimedOut(f"timed out: {booted}; the machine was stopped")
        return max(left, 0)

    def _serve(
        self,
        readiness: selectors.BaseSelector,
        key: selectors.SelectorKey,
        ports: Mapping[str, socket.socket],
    ) -> None:
        if key.data == "keyboard":
            assert self._terminal is not None  # noqa: S101 - only then was it registered
            typed = self._terminal.read()
            with contextlib.suppress(OSError):  # the machine is gone
                ports["out"].sendall(typed)
            return
        try:
            chunk = ports[key.data].recv(CHUNK)
        except OSError:  # the machine is gone
            chunk = b""
        if not chunk:
            readiness.unregister(key.fileobj)
        elif key.data == "control":
            self._listen(chunk)
        elif key.data in self._streams:
            self._sinks[key.data](self._streams[key.data].feed(chunk))
        if self.returncode is not None:
            self._deadline = time.monotonic() + REST_PATIENCE

    def _listen(self, chunk: bytes) -> None:
        *lines, self._control = (self._control + chunk).split(b"\n")
        for line in lines:
            word, _, number = line.partition(b" ")
            if word == b"ready":
                self.ready_at = time.monotonic()
            elif word == b"exit" and number.isdigit():
                self.returncode = int(number)

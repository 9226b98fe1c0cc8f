"""Manages one child process of the daemon: starts and kills it, sends calls over a socketpair, matches answers."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Final

from upcall.core.errors import ModuleFailed, PeerError, Refused, UpcallError
from upcall.keymodule import Secrets
from upcall.process import start_python as startpython
from upcall.wire.isolation import (
    ANSWER,
    BROKE,
    FAILED,
    MAX_DATA,
    MAX_MESSAGE,
    OUTCOMES,
    PASSPHRASE,
    PIN,
    QUESTIONS,
    VERDICT,
    ChildMessage,
    fitting,
    pack,
    refused_message,
    take,
)

GRACE: Final = 1.0  # seconds after a call's deadline until a child that has not answered counts as hanging
CONCURRENT: Final = 16  # calls at a time; the child has a thread for each


class Gone(UpcallError):
    """The child has ended, or is being ended. The call has no answer."""


class _Call:
    """A pending call. `heard`: the child's last message about it, until the caller takes it."""

    __slots__ = ("heard", "key", "overdue")

    def __init__(self, key: str) -> None:
        self.key = key
        self.heard: ChildMessage | None = None
        self.overdue = False


class Child:
    """Starts a process; does not block. Thread-safe.

    `spec`: of the module, "package:attribute". `memory`: limit in bytes. `failed(why, keys)` is called once, from any
    thread, if the process fails; not if `end` was called without a failure. `keys`: signatures of the pending calls.
    """

    def __init__(self, spec: str, memory: int, failed: Callable[[str, set[str]], None]) -> None:
        self._failed = failed
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._change = threading.Condition()
        self._calls: dict[int, _Call] = {}
        self._number = 0
        self._reading = False
        self._buffer = bytearray(MAX_MESSAGE)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._running = False  # the process has not been reaped: its pid is valid
        self.gone = False  # no messages are sent or received any more
        self.retired = False  # it hangs or leaks: pending calls may finish, new ones are refused
        self.pid: int | None = None
        self.status: int | None = None
        arguments = startpython.command("upcall.daemon.isolation", str(theirs.fileno()), str(memory), spec)
        threading.Thread(target=self._live, args=(arguments, theirs), name="isolated", daemon=True).start()

    # --- its life ------------------------------------------------------------------------------------------

    def _live(self, arguments: list[str], theirs: socket.socket) -> None:
        """Forks the process and waits for its end, in a thread of its own: PR_SET_PDEATHSIG refers to that thread."""
        why = "could not be started"
        null = subprocess.DEVNULL  # discards output: a library may print secrets
        try:
            with theirs:
                process = subprocess.Popen(
                    arguments,
                    stdin=null,
                    stdout=null,
                    stderr=null,
                    env=startpython.cleaned(),
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
            why = self._watch(process)
        except OSError as error:
            why = f"could not be started: {error.strerror}"
        finally:
            self.end(why)
        with self._change:
            self._change.wait_for(lambda: not self._reading)
            self._socket.close()
            self._buffer[:] = bytes(len(self._buffer))

    def _watch(self, process: subprocess.Popen[bytes]) -> str:
        with self._change:
            self.pid, self._running = process.pid, True
            if self.gone:
                self._kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with self._change:
            self._kill()  # kills its descendants before the pid can be reused
            self._running = False
        self.status = process.wait()
        return f"ended with status {self.status}"

    def _kill(self) -> None:
        """Kills the process group. The caller holds the lock."""
        if self._running and self.pid is not None:
            with contextlib.suppress(OSError):
                os.killpg(self.pid, signal.SIGKILL)

    def end(self, failure: str | None = None) -> None:
        """Kills the process. All pending calls raise Gone. `failure`: the child's fault, None if it has none."""
        with self._change:
            if self.gone:
                return
            self.gone = True
            keys = {call.key for call in self._calls.values() if not call.overdue}
            told, self.retired = self.retired, True
            self._kill()
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads
            self._change.notify_all()
        if failure is not None and not told:
            self._failed(failure, keys)

    def lost(self) -> bool:
        """Returns whether new calls need another child."""
        if self.gone or self.retired:
            return True
        with self._change:
            if not self.gone and not self._reading:
                return any(events & select.POLLHUP for _, events in self._poll.poll(0))
        return self.gone

    # --- calls ---------------------------------------------------------------------------------------------

    def ask(
        self, kind: int, handle: int, key: str, secrets: Secrets, deadline: float, text: str = "", data: bytes = b""
    ) -> ChildMessage:
        """Sends a call and returns its outcome; blocks until then. Answers the child's questions by `secrets`, in the
        calling thread.

        `kind`, `handle`, `text`, `data`: as in upcall/wire/isolation.py. `key`: the signature. `deadline`: seconds of
        CLOCK_MONOTONIC. Gone; Refused: "timed-out" after the deadline, "busy" if CONCURRENT calls ran until then.
        """
        call = _Call(key)
        with self._change:
            free = self._change.wait_for(
                lambda: self.gone or len(self._calls) < CONCURRENT, max(0.0, deadline - time.monotonic())
            )
            if not free:
                raise Refused("busy")
            self._number = number = (self._number + 1) & 0xFFFFFFFF
            self._send(ChildMessage(kind, number, handle, 0, text, data))
            self._calls[number] = call
        try:
            while (heard := self._await(call, deadline)).kind not in OUTCOMES:
                said = _answered(heard, secrets)
                with self._change:
                    self._send(said)
                if isinstance(said.data, bytearray):
                    said.data[:] = bytes(len(said.data))
            if heard.kind in (FAILED, BROKE) and heard.code:
                self._retire("leaks: no descriptors or no memory left", key)
            return heard
        except Gone:
            self.end("closed its socket")
            raise
        except BaseException:
            call.overdue = True  # its answer may still arrive
            raise
        finally:
            self._leave(number, call)

    def _send(self, message: ChildMessage) -> None:
        """Sends without blocking. The caller holds the lock. Gone."""
        if self.gone:
            raise Gone
        data = pack(message)
        try:
            self._socket.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            raise Refused("busy") from None
        except OSError:
            raise Gone from None  # the thread that waits for its end reports it
        finally:
            data[:] = bytes(len(data))

    def _await(self, call: _Call, deadline: float) -> ChildMessage:
        """Waits for the child's next message about this call. One of the waiting threads reads for all."""
        while True:
            with self._change:
                self._change.wait_for(
                    lambda: call.heard is not None or self.gone or not self._reading,
                    max(0.0, deadline - time.monotonic()),
                )
                heard, call.heard = call.heard, None
                if heard is not None:
                    return heard
                if self.gone:
                    raise Gone
                if time.monotonic() >= deadline:
                    raise Refused("timed-out")
                if self._reading:
                    continue
                self._reading = True
            self._read(call, deadline)

    def _read(self, call: _Call, deadline: float) -> None:
        """Reads and dispatches messages until one is for `call`, or until the deadline. Then another thread reads."""
        why = None
        try:
            while call.heard is None and not self.gone:
                wait = max(0.0, deadline - time.monotonic())
                if not self._poll.poll(wait * 1000):
                    break
                why = self._receive()
                if why is not None:
                    break
        finally:
            with self._change:
                self._reading = False
                self._change.notify_all()
        if why is not None:
            self.end(why)

    def _receive(self) -> str | None:
        """Receives and dispatches one message. Returns why the child cannot be used any more, otherwise None."""
        try:
            size = self._socket.recv_into(self._buffer)
            if not size:
                return "closed its socket"
            with memoryview(self._buffer)[:size] as view:
                message = take(view)
            self._buffer[:size] = bytes(size)
        except OSError:
            return "closed its socket"
        except PeerError as error:
            return f"talks nonsense: {error}"
        with self._change:
            call = self._calls.get(message.id)
            if call is None or call.heard is not None or message.kind not in OUTCOMES | QUESTIONS:
                return f"talks nonsense: kind {message.kind} about call {message.id}"
            if not call.overdue:
                call.heard = message
            elif message.kind in OUTCOMES:
                del self._calls[message.id]  # late, but the child does not hang
            else:
                with contextlib.suppress(Gone, Refused):
                    self._send(refused_message(message.id, Refused("timed-out")))
            self._change.notify_all()
        return None

    def _leave(self, number: int, call: _Call) -> None:
        with self._change:
            if call.overdue and not self.gone:
                watch = threading.Timer(GRACE, self._look_after, (number,))
                watch.daemon = True
                watch.start()
            else:
                self._calls.pop(number, None)
            self._change.notify_all()
            retired = self.retired
        if retired:
            self._end_if_due()

    def _look_after(self, number: int) -> None:
        """Checks, GRACE seconds after a call timed out, whether it was answered. If not, retires the child."""
        with self._change:
            self._change.wait_for(lambda: not self._reading or number not in self._calls or self.gone, GRACE)
            reads = not self._reading and not self.gone
            self._reading = self._reading or reads
        if reads:
            self._read(_Call(""), 0.0)
        with self._change:
            call = self._calls.get(number)
            if call is None or self.gone:
                return
        self._retire("hangs", call.key)
        self._end_if_due()

    def _retire(self, why: str, key: str) -> None:
        """Refuses new calls, and ends the child once no pending call can succeed."""
        with self._change:
            told, self.retired = self.retired, True
        if not told:
            self._failed(why, {key})

    def _end_if_due(self) -> None:
        """Ends a retired child once all its pending calls are overdue."""
        with self._change:
            if not self.retired or not all(call.overdue for call in self._calls.values()):
                return
        self.end()


def _answered(question: ChildMessage, secrets: Secrets) -> ChildMessage:
    """Answers a question of the module by `secrets`."""
    kind, number, text, prompt = question.kind, question.id, question.text, str(question.data, "utf-8", "replace")
    try:
        secret = bytearray()
        if kind == PASSPHRASE:
            secret = secrets.passphrase(text)
        elif kind == PIN:
            secret = secrets.pin(text, prompt)
        elif kind == VERDICT:
            secrets.verdict(text, bool(question.code))
        else:
            secrets.touch(text, prompt)
        return ChildMessage(ANSWER, number, data=secret) if len(secret) <= MAX_DATA else ChildMessage(BROKE, number)
    except Refused as refused:
        return refused_message(number, refused)
    except ModuleFailed as error:
        return ChildMessage(FAILED, number, text=fitting(str(error)))
    except Exception:  # noqa: BLE001 - the child must not see the text: it may contain secrets
        return ChildMessage(BROKE, number)

"""Serves a key module in the child: a few threads receive requests from the socketpair and call the module."""

from __future__ import annotations

import math
import os
import socket
import threading
import time
import traceback
from typing import NoReturn

from upcall.core.errors import ModuleFailed, Refused
from upcall.keymodule import Closable, KeyHandle, KeyModule, Public, Watched
from upcall.keys.plugins import load
from upcall.protocols.ecryptfs.self_deadlock import PATIENCE, OwnWaits
from upcall.wire.isolation import (
    ANSWER,
    BROKE,
    CLOSABLE,
    CLOSE,
    EXHAUSTED,
    EXPORT,
    FAILED,
    MAX_DATA,
    MAX_MESSAGE,
    OPEN,
    OUTCOMES,
    PASSPHRASE,
    PIN,
    PUBLIC,
    REFUSED,
    STALE,
    TOUCH,
    UNWRAP,
    VERDICT,
    WATCHED,
    ChildMessage,
    fitting,
    pack,
    refused_message,
    refused_of,
    take,
)

_TO_WORK_WITH = 4 << 20  # bytes of memory that must be free for the next request


class _Nonsense(Exception):
    """The module returned a value that its interface does not allow. The text names types and sizes only."""


class ModuleServer:
    """Serves one module until the daemon closes the connection."""

    def __init__(self, connection: socket.socket, spec: str) -> None:
        self._socket, self._spec = connection, spec
        self._module: KeyModule | None = None
        self._loading = threading.Lock()
        self._lock = threading.Lock()
        self._receiving = 0
        self._handles: dict[int, KeyHandle] = {}
        self._asked: dict[int, tuple[threading.Event, list[ChildMessage]]] = {}
        self._serving = threading.local()
        self._own: OwnWaits[ChildMessage] = OwnWaits(self._refuse_own)
        self._busy = threading.Event()
        os.register_at_fork(after_in_child=self._socket.close)  # a module's fork must not serve, too

    def run(self) -> NoReturn:
        with self._lock:
            self._receiving = 1
        threading.Thread(target=self._watch, name="watch", daemon=True).start()
        self._work()

    def _watch(self) -> NoReturn:
        """Refuses calls whose threads wait for the daemon itself, through eCryptfs (self-deadlock). Sleeps while no
        call runs. The daemon cannot detect this: it may not read /proc/PID/wchan of this process."""
        while True:
            self._busy.wait()
            self._busy.clear()
            while self._own.held:
                time.sleep(PATIENCE / 5)
                self._own.look()

    def _refuse_own(self, asked: ChildMessage, _by: str = "") -> None:
        self._send(refused_message(asked.id, Refused("own-request")))

    def _work(self) -> NoReturn:
        """Receives and answers requests, in a thread of its own. While it handles one, another thread receives."""
        buffer = bytearray(MAX_MESSAGE)
        view = memoryview(buffer)
        status = 1
        try:
            while size := self._socket.recv_into(buffer):
                message = take(view[:size])
                buffer[:size] = bytes(size)
                if message.kind in OUTCOMES:
                    self._on_outcome(message)
                    continue
                if not self._own.hold(message.id, math.inf, message.text or str(message.handle), message):
                    self._refuse_own(message)
                    continue
                self._busy.set()
                self._enter()
                answer = self._serve(message)
                if answer.kind in (FAILED, BROKE) and self._exhausted():
                    answer = answer._replace(code=EXHAUSTED)
                if self._own.let_go(message.id):
                    self._send(answer)
                elif message.kind == OPEN:
                    self._handles.pop(message.handle, None)  # the daemon did not learn of the handle
                with self._lock:
                    self._receiving += 1
            status = 0
        finally:
            os._exit(status)  # without cleanup: other threads may hang

    def _enter(self) -> None:
        """Makes another thread receive. The daemon sends at most as many requests at a time as there are threads."""
        with self._lock:
            self._receiving -= 1
            if not self._receiving:
                self._receiving += 1
                threading.Thread(target=self._work, daemon=True).start()

    def _exhausted(self) -> bool:
        """Returns whether memory or descriptors are used up by a leak. The process then ends, and is replaced."""
        try:
            os.close(os.dup(self._socket.fileno()))
            bytearray(_TO_WORK_WITH)
        except (OSError, MemoryError):
            return True
        return False

    def _send(self, message: ChildMessage) -> None:
        data = pack(message)
        try:
            self._socket.send(data)
        finally:
            data[:] = bytes(len(data))

    # --- requests ------------------------------------------------------------------------------------------

    def _serve(self, asked: ChildMessage) -> ChildMessage:
        """Calls the module. Returns its answer, or its exception as a message."""
        self._serving.request = asked
        try:
            answer = self._answer(asked)
            if len(answer.data) > MAX_DATA:
                raise _Nonsense(f"gave {len(answer.data)} bytes")
            return answer
        except Refused as refused:
            return refused_message(asked.id, refused)
        except ModuleFailed as error:
            return ChildMessage(FAILED, asked.id, text=fitting(str(error)))
        except _Nonsense as error:
            return ChildMessage(BROKE, asked.id, text=fitting(str(error)))
        except BaseException as error:  # noqa: BLE001 - any exception of a module becomes an answer
            return ChildMessage(BROKE, asked.id, text=fitting(_where(error)))
        finally:
            self._serving.request = None

    def _answer(self, asked: ChildMessage) -> ChildMessage:
        if asked.kind == OPEN:
            return self._open(asked)
        if asked.kind == CLOSE:
            closing = self._handles.pop(asked.handle, None)
            if isinstance(closing, Closable):
                closing.close()
            return ChildMessage(ANSWER, asked.id)
        handle = self._handles.get(asked.handle)
        if handle is None:
            raise ModuleFailed("the key was closed meanwhile")
        if asked.kind == STALE:
            return ChildMessage(ANSWER, asked.id, code=int(isinstance(handle, Watched) and bool(handle.stale())))
        if asked.kind == EXPORT:
            if not isinstance(handle, Public):
                raise ModuleFailed("the key has no public half")
            return ChildMessage(ANSWER, asked.id, data=_bytes(handle.export_public()))
        verb = handle.unwrap if asked.kind == UNWRAP else handle.wrap
        return ChildMessage(ANSWER, asked.id, data=_bytes(verb(bytes(asked.data))))

    def _open(self, asked: ChildMessage) -> ChildMessage:
        with self._loading:
            if self._module is None:
                self._module = load(self._spec)
        handle = self._module.open(asked.text, bytes(asked.data), _AskedFor(self, asked.handle))
        if not callable(getattr(handle, "wrap", None)) or not callable(getattr(handle, "unwrap", None)):
            raise _Nonsense(f"opened a {type(handle).__name__}")
        self._handles[asked.handle] = handle
        powers = WATCHED * isinstance(handle, Watched) | CLOSABLE * isinstance(handle, Closable)
        return ChildMessage(ANSWER, asked.id, code=powers | PUBLIC * isinstance(handle, Public))

    # --- questions -----------------------------------------------------------------------------------------

    def ask(self, kind: int, handle: int, text: str, data: bytes = b"", code: int = 0) -> bytearray:
        """Asks the daemon for a secret, for the request that the calling thread handles. Blocks until its answer.

        Refused("locked"), without asking, if the thread handles no request, or the passphrase of another key than the
        request's is needed.
        """
        request: ChildMessage | None = getattr(self._serving, "request", None)
        if request is None or (kind == PASSPHRASE and request.handle != handle):
            raise Refused("locked")
        event, said = self._asked[request.id] = threading.Event(), []
        try:
            self._send(ChildMessage(kind, request.id, code=code, text=text, data=data))
            event.wait()
        finally:
            del self._asked[request.id]
        return _said(said[0])

    def _on_outcome(self, message: ChildMessage) -> None:
        event, said = self._asked.get(message.id) or (threading.Event(), [])
        said.append(message)
        event.set()


def _said(outcome: ChildMessage) -> bytearray:
    if outcome.kind == ANSWER:
        return outcome.data if isinstance(outcome.data, bytearray) else bytearray(outcome.data)
    if outcome.kind == REFUSED:
        raise refused_of(outcome)
    if outcome.kind == FAILED:
        raise ModuleFailed(outcome.text)
    raise Refused("module-broke")


class _AskedFor:
    """Implements `keymodule.Secrets` for one key, by asking the daemon."""

    def __init__(self, server: ModuleServer, handle: int) -> None:
        self._server, self._handle = server, handle

    def passphrase(self, source: str, /) -> bytearray:
        return self._server.ask(PASSPHRASE, self._handle, source)

    def pin(self, token: str, prompt: str, /) -> bytearray:
        return self._server.ask(PIN, self._handle, token, prompt.encode("utf-8", "backslashreplace"))

    def verdict(self, token: str, good: bool, /) -> None:
        self._server.ask(VERDICT, self._handle, token, code=int(good))

    def touch(self, token: str, prompt: str, /) -> None:
        self._server.ask(TOUCH, self._handle, token, prompt.encode("utf-8", "backslashreplace"))


def _bytes(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise _Nonsense(f"gave a {type(value).__name__}, not bytes")
    return value


def _where(error: BaseException) -> str:
    """Returns type, file and line of an exception. Its text is left out: it may contain secrets."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__} at {frames[-1].filename}:{frames[-1].lineno}" if frames else type(error).__name__

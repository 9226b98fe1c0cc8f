"""Serves the user's commands: unlock, lock, status, reload. Passphrases are passed over its socket, never by argv."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from upcall import __version__
from upcall.core.errors import PeerError, Refused, UpcallError
from upcall.core.messages import Answer, Refusal
from upcall.kernel import ucred
from upcall.kernel.local import listen, listens, receive
from upcall.kernel.process import wipe
from upcall.process.paths import own_daemon_socket, own_daemon_sockets
from upcall.protocols.ecryptfs.key_cache import KeyCache
from upcall.protocols.ecryptfs.packets import SIGNATURE_LENGTH, is_signature
from upcall.wire.envelope import Envelope, pack_response, take_request

UNLOCK, LOCK, STATUS, PROMPT = "daemon.unlock", "daemon.lock", "daemon.status", "daemon.prompt"
RELOAD = "daemon.reload"
_PATIENCE = 1.0  # seconds that a command may block the daemon's main thread


class Control:
    """Listens on a socket of mode 0600 in the user's folder. Serves one connection at a time, in the main thread;
    those of terminals that answer prompts are passed to the prompter."""

    def __init__(
        self,
        path: Path,
        keys: KeyCache,
        warm: Callable[[list[str]], None],
        attach: Callable[[socket.socket, bytes], None],
    ) -> None:
        """`warm(signatures)`: opens keys, and may prompt: it is called in a thread of its own. `attach`: see Prompter.

        Does not listen yet if another daemon of this user does: see `take`."""
        self._path, self._keys, self._warm, self._attach = path, keys, warm, attach
        self._since = time.time()
        self._own = own_daemon_socket(path)
        self._own.unlink(missing_ok=True)
        _remove_leftovers(path)
        self.listener = listen(self._own, 0o600)
        self._inode = self._own.stat().st_ino
        if not listens(path):
            self.take()
        self.on_reload: Callable[[], None] = lambda: None  # must not block; RuntimeError: no more threads
        self.last_refusal: Callable[[], dict[str, object]] = dict  # for the status: `at` in seconds since the epoch
        self.more: Callable[[], dict[str, object]] = dict  # for the status, as JSON has it

    def take(self) -> None:
        """Takes over the socket's path, unless it has it: only the registered daemon serves commands. Otherwise a
        daemon that waits for a broker would report keys as locked that the other one uses. OSError."""
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_ino == self._inode:
                return
        beside = self._own.with_name(f"{self._own.name}.new")
        beside.unlink(missing_ok=True)
        os.link(self._own, beside)  # the own name stays: another daemon may take the path in between, and end
        beside.replace(self._path)

    @contextlib.contextmanager
    def registering(self, timeout: float) -> Iterator[None]:
        """Keeps other daemons of this user from registering between this one's HELO and its `take`: the one that
        registers last must have the socket. Waits for `timeout` seconds at most: another one may have been stopped."""
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            until = time.monotonic() + timeout
            while True:
                try:
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > until:
                        break
                    time.sleep(0.01)
            yield
        finally:
            os.close(folder)

    def serve_one(self) -> None:
        """Accepts one connection and serves its request. Blocks for a second at most."""
        try:
            connection, _ = self.listener.accept()
        except OSError:
            return
        with connection:
            connection.settimeout(_PATIENCE)
            try:
                if ucred.of_peer(connection).uid not in (0, os.geteuid()):
                    return
                data = receive(connection)
                if data:
                    self._serve(connection, data)
            except (OSError, UpcallError):
                return

    def _serve(self, connection: socket.socket, data: bytes) -> None:
        """Answers a message and wipes it: it may have a passphrase, also if it is malformed. OSError, UpcallError."""
        try:
            envelope = take_request(data)
            try:
                answer = self._answer(envelope, connection)
            finally:
                if envelope.service == UNLOCK:
                    wipe(envelope.body)
            if answer is not None:
                connection.send(pack_response(envelope.seq, envelope.index, answer))
        finally:
            wipe(data)

    def _answer(self, envelope: Envelope, connection: socket.socket) -> Answer | Refusal | None:
        """Returns the outcome; None if the connection was passed to the prompter."""
        try:
            if envelope.service == PROMPT:
                welcome = pack_response(envelope.seq, envelope.index, Answer(b""))
                self._attach(connection.dup(), welcome)
                return None
            return Answer(self._do(envelope.service, envelope.body))
        except PeerError:
            refused = Refused("bad-request")
        except Refused as error:
            refused = error
        except RuntimeError:  # no more threads
            refused = Refused("busy")
        wanted = envelope.wants_why and ucred.of_peer(connection).uid == os.geteuid()
        return Refusal(refused.reason, refused.errno, refused.why if wanted else "")

    def _do(self, service: str, body: bytes) -> bytes:
        if service == STATUS:
            told = {"pid": os.getpid(), "version": __version__, "keys": self._keys.status()}
            told |= {"held": self._keys.held(), "locks": self._keys.locks(), "passphrases": self._keys.remembered()}
            told |= {"since": self._since, "last_refusal": self.last_refusal(), **self.more()}
            return json.dumps(told).encode("ascii")
        if service == LOCK:
            return _decimal(self._keys.lock(_signature(body) if body else None))
        if service == UNLOCK and not body:
            return _decimal(self._keys.unlock_all())
        if service == UNLOCK:
            signature = _signature(body[:SIGNATURE_LENGTH])
            unlocked = self._keys.unlock(signature, bytearray(memoryview(body)[SIGNATURE_LENGTH:]))
            threading.Thread(target=self._warm, args=([signature],), name="warm", daemon=True).start()
            return _decimal(unlocked)
        if service == RELOAD:
            self.on_reload()
            return b""
        raise Refused("no-service")

    def close(self) -> None:
        self.listener.close()
        for path in (self._own, self._path):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino == self._inode:  # otherwise a newer daemon listens there
                    path.unlink()


def _remove_leftovers(path: Path) -> None:
    """Removes the sockets beside `path` of daemons that were killed: their pid is gone, and no process of another pid
    namespace listens there."""
    for found, lives in own_daemon_sockets(path):
        with contextlib.suppress(OSError):
            if not lives and found.is_socket() and not listens(found):
                found.unlink()


def _decimal(number: int) -> bytes:
    return b"%d" % number


def _signature(data: bytes) -> str:
    signature = data.decode("latin-1")
    if not is_signature(signature):
        raise PeerError("signature", "is not 16 hexadecimal digits")
    return signature

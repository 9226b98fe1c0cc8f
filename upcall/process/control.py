"""Sends the user's commands to the user's daemon: lock, unlock, reload, status."""

from __future__ import annotations

import json
import os
import socket
import time
from types import TracebackType
from typing import Any, Final, Self

from upcall.core.errors import PeerError, UpcallError, UsageError, error_words
from upcall.process.connection import LocalConnection
from upcall.process.paths import daemon_socket, own_daemon_sockets

_HANDOVER: Final = 5.0  # seconds that a newer daemon may need from its registration until it has the socket


class NoDaemon(UpcallError):
    """The user's daemon is not running, or does not answer."""


class DaemonControl:
    """The connection to the user's daemon, by a socket that only this user can reach. One connection per command.
    Methods block for a few seconds at most; NoDaemon if the daemon does not answer."""

    def __init__(self) -> None:
        """NoDaemon if the daemon is not running."""
        self._path = daemon_socket(create=False)
        self._connect().close()

    def _connect(self) -> LocalConnection:
        """Waits for a daemon that is about to take the socket over: for a moment no process listens there."""
        until = time.monotonic() + _HANDOVER
        waits = True
        while True:
            try:
                return LocalConnection(self._path, frozenset({os.geteuid()}))
            except (ConnectionRefusedError, FileNotFoundError) as error:
                if time.monotonic() > until or not waits:
                    raise NoDaemon(f"no daemon at {self._path}: {error_words(error)}") from error
                # Without such a daemon once more: it may have taken the socket over since the connection failed.
                waits = any(lives for _, lives in own_daemon_sockets(self._path))
                time.sleep(0.02)
            except (OSError, UsageError) as error:
                raise NoDaemon(f"no daemon at {self._path}: {error_words(error)}") from error

    def unlock(self, signature: str, passphrase: bytearray) -> bool:
        """Passes a key's passphrase to the daemon, which keeps it in locked memory. The caller must wipe its own.
        Returns whether the key was locked (True from an older daemon, which does not say it)."""
        return self._ask("daemon.unlock", signature.encode("ascii") + passphrase) != b"0"

    def unlock_all(self) -> bool:
        """Ends all locks. Wiped passphrases are prompted for when they are needed. Returns whether there was one (True
        from an older daemon, which does not say it)."""
        return self._ask("daemon.unlock", b"") != b"0"

    def lock(self, signature: str | None) -> int:
        """Makes the daemon close one key, or all (None), and refuse requests for them. Returns how many were open."""
        return int(self._ask("daemon.lock", (signature or "").encode("ascii")))

    def reload(self) -> None:
        """Makes the daemon reload its configuration, asynchronously; the result is in its log."""
        self._ask("daemon.reload", b"")

    def status(self) -> dict[str, Any]:
        """Returns the daemon's status as plain data. PeerError if it is malformed."""
        found = json.loads(self._ask("daemon.status", b""))
        if not isinstance(found, dict):
            raise PeerError("status", "is not a JSON object")
        return found

    def prompts(self) -> socket.socket:
        """Returns a connection on which the daemon sends prompts: see upcall.daemon.prompting.agent."""
        connection = self._connect()
        try:
            connection.ask("daemon.prompt", os.geteuid(), b"", 5.0)
        except BaseException as error:
            connection.close()
            if isinstance(error, OSError):
                raise NoDaemon(f"the daemon does not answer: {error_words(error)}") from error
            raise
        return connection.detach()

    def _ask(self, service: str, body: bytes, again: bool = True) -> bytes:
        """Sends one request on a connection of its own, so that the daemon's main thread need not watch idle ones. If
        the daemon ends before it answers, sends it once more (`again`): a repeated command has the same effect."""
        connection = self._connect()
        try:
            return connection.ask(service, os.geteuid(), body, 5.0)
        except OSError as error:
            if not (again and isinstance(error, ConnectionError)):
                raise NoDaemon(f"the daemon does not answer: {error_words(error)}") from error
        finally:
            connection.close()
        return self._ask(service, body, again=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

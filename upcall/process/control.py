"""This user's commands to this user's daemon."""

from __future__ import annotations

import json
import os
import socket
from types import TracebackType
from typing import Any, Self

from upcall.core.errors import PeerError, UpcallError, UsageError
from upcall.process.connection import LocalConnection
from upcall.process.paths import daemon_socket


class NoDaemon(UpcallError):
    """This user has no daemon, or it does not answer."""


class DaemonControl:
    """This user's commands to this user's daemon, which is on the other side of a socket that only they can reach."""

    def __init__(self) -> None:
        """NoDaemon if none is running."""
        self._path = daemon_socket()
        self._connect().close()

    def _connect(self) -> LocalConnection:
        try:
            return LocalConnection(self._path, frozenset({os.geteuid()}))
        except (OSError, UsageError) as error:
            raise NoDaemon(f"no daemon at {self._path}: {error}") from error

    def unlock(self, signature: str, passphrase: bytearray) -> None:
        """Gives the daemon a key's passphrase to keep in locked memory; the caller wipes its own buffer."""
        self._ask("daemon.unlock", signature.encode("ascii") + passphrase)

    def unlock_all(self) -> None:
        """Ends every lock, whatever it was for. Passphrases that were forgotten are asked for."""
        self._ask("daemon.unlock", b"")

    def lock(self, signature: str | None) -> int:
        """Makes the daemon forget one key, or all, and refuse them; gives how many it knew."""
        return int(self._ask("daemon.lock", (signature or "").encode("ascii")))

    def reload(self) -> None:
        """Has the daemon read its configuration again, soon; its log says what became of it."""
        self._ask("daemon.reload", b"")

    def status(self) -> dict[str, Any]:
        found = json.loads(self._ask("daemon.status", b""))
        if not isinstance(found, dict):
            raise PeerError("status", "is not a JSON object")
        return found

    def prompts(self) -> socket.socket:
        """A connection on which the daemon asks for PINs from now on: see upcall.daemon.prompting.agent."""
        connection = self._connect()
        try:
            connection.ask("daemon.prompt", os.geteuid(), b"", 5.0)
        except BaseException as error:
            connection.close()
            if isinstance(error, OSError):
                raise NoDaemon(f"the daemon does not answer: {error}") from error
            raise
        return connection.detach()

    def _ask(self, service: str, body: bytes) -> bytes:
        """One request per connection: the daemon's main thread has other things to watch."""
        connection = self._connect()
        try:
            return connection.ask(service, os.geteuid(), body, 5.0)
        except OSError as error:
            raise NoDaemon(f"the daemon does not answer: {error}") from error
        finally:
            connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

"""Serves metrics over HTTP, to this machine only: on a socket in the file system, or a TCP port of a local address.

A limited number of connections are served at a time, each in a thread. A connection ends after a total time, however
slowly its client reads or writes; the oldest one is cut when there are too many.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from upcall.config.kinds import on_this_machine
from upcall.core.errors import UsageError

MODE = 0o660  # of a socket in the file system
_PATIENCE = 5.0  # seconds, the time-out of a whole connection
_MOST = 16  # connections, and threads, at a time


class _Handler(WSGIRequestHandler):
    timeout = _PATIENCE

    def address_string(self) -> str:
        return "local"

    def log_message(self, *_: Any) -> None:
        """Logs nothing: Prometheus asks every few seconds."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 64
    group: int | None = None  # of a socket in the file system

    def __init__(self, *arguments: Any) -> None:
        self._began: dict[socket.socket, float] = {}  # oldest first
        self._lock = threading.Lock()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serves a connection in a thread. Cuts the oldest connection if there are too many."""
        with self._lock:
            if len(self._began) >= _MOST:
                self._cut(next(iter(self._began)))
            self._began[request] = time.monotonic()
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Cuts connections after their time-out. serve_forever calls this at least twice a second."""
        now = time.monotonic()
        with self._lock:
            for request in [one for one, began in self._began.items() if now - began > _PATIENCE]:
                self._cut(request)

    def _cut(self, request: socket.socket) -> None:
        """Shuts a connection down: its thread's recv or send returns at once, and the thread ends."""
        del self._began[request]
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._began.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores the error: a connection was cut, or its client has closed it."""


class _Inet6(_Server):
    address_family = socket.AF_INET6


class _Unix(_Server):
    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        """Binds as SimpleServer does, without looking up a host name, which a path does not have."""
        before = os.umask(0o777 & ~MODE)
        try:
            self.socket.bind(self.server_address)
        finally:
            os.umask(before)
        if self.group is not None:
            os.chown(str(self.server_address), -1, self.group)  # before listen(2): nobody can connect yet
        self.server_name, self.server_port = "localhost", 0
        self.setup_environ()

    def get_request(self) -> tuple[Any, Any]:
        connection, _ = self.socket.accept()
        return connection, ("local", 0)


def server(address: str, app: Callable[..., Any], group: int | None = None) -> WSGIServer:
    """Returns a server that listens at `unix:PATH` or `HOST:PORT`; call its serve_forever. `group`: the gid of a
    socket in the file system, whose mode is 0660. UsageError for a malformed or non-local address; OSError."""
    if address.startswith("unix:"):
        path = Path(address.removeprefix("unix:"))
        _clear(path)
        kind = type("_Unix", (_Unix,), {"group": group})
        made: WSGIServer = kind(str(path), _Handler)
    else:
        host, colon, port = address.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
            raise UsageError(f"{address!r}: must be unix:PATH or 127.0.0.1:PORT")
        if not on_this_machine(host):
            raise UsageError(f"{host!r} is not this machine's own address: put an authenticating proxy in front of it")
        made = (_Inet6 if ":" in host else _Server)((host, int(port)), _Handler)
    made.set_app(app)
    return made


def _clear(path: Path) -> None:
    """Removes a stale socket. OSError EADDRINUSE if a process listens there."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise OSError(errno.EADDRINUSE, "another process listens there already", str(path))

"""Metrics over HTTP, on this machine only: a TCP port of its own address, or a socket in the file system."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from upcall.config.kinds import on_this_machine
from upcall.errors import UsageError

MODE = 0o660  # of a socket in the file system
_PATIENCE = 5.0  # seconds for whoever asks slowly


class _Handler(WSGIRequestHandler):
    timeout = _PATIENCE

    def address_string(self) -> str:
        return "local"

    def log_message(self, *_: Any) -> None:
        """Nothing: Prometheus asks every few seconds."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Inet6(_Server):
    address_family = socket.AF_INET6


class _Unix(_Server):
    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        """As SimpleServer does it, but for the host's name, which a path has not."""
        before = os.umask(0o777 & ~MODE)
        try:
            self.socket.bind(self.server_address)
        finally:
            os.umask(before)
        self.server_name, self.server_port = "localhost", 0
        self.setup_environ()

    def get_request(self) -> tuple[Any, Any]:
        connection, _ = self.socket.accept()
        return connection, ("local", 0)


def server(address: str, app: Callable[..., Any]) -> WSGIServer:
    """Listens at `unix:PATH` or `HOST:PORT`; call its serve_forever. UsageError for another machine's or a bad
    address, OSError if it cannot be had."""
    if address.startswith("unix:"):
        path = Path(address.removeprefix("unix:"))
        _clear(path)
        made: WSGIServer = _Unix(str(path), _Handler)  # type: ignore[arg-type]
    else:
        host, colon, port = address.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
            raise UsageError(f"{address!r}: unix:PATH or 127.0.0.1:PORT is wanted")
        if not on_this_machine(host):
            raise UsageError(f"{host!r} is not this machine's own address: put a proxy before it that asks who comes")
        made = (_Inet6 if ":" in host else _Server)((host, int(port)), _Handler)
    made.set_app(app)
    return made


def _clear(path: Path) -> None:
    """A socket that nobody listens on any more is taken away."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise OSError(errno.EADDRINUSE, "somebody listens there already", str(path))

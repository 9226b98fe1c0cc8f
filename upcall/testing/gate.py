"""Blocks a key module's calls: the test learns that a call has arrived, and releases it."""

from __future__ import annotations

import socket
from pathlib import Path

from upcall.testing.processes import PATIENCE


class Visitor:
    """A blocked call."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def release(self) -> None:
        self._connection.close()


class Gate:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._listener.settimeout(PATIENCE)
        self._visitors: list[Visitor] = []  # not released yet

    def arrived(self) -> Visitor:
        connection, _ = self._listener.accept()
        self._visitors.append(Visitor(connection))
        return self._visitors[-1]

    def close(self) -> None:
        self._listener.close()
        for visitor in self._visitors:
            visitor.release()

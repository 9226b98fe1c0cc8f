"""Runs a broker in a thread of the test's process, with daemons that consist of links only."""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from upcall.broker.server import Server
from upcall.broker.source_listener import SourceListener
from upcall.core.registry import Association
from upcall.process.loop import URGENT
from upcall.process.paths import own_place
from upcall.process.waker import Waker
from upcall.testing.processes import PATIENCE

T = TypeVar("T")


class Link:
    """A link to a daemon: a real socket, whose queue can be full."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ours.setblocking(False)
        self.theirs.setblocking(False)

    def send(self, data: bytes) -> bool:
        try:
            self.ours.send(data)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        self.ours.close()


class BrokerThread:
    """A broker in a thread of its own, which also runs the test's functions there."""

    def __init__(self, folder: Path) -> None:
        self.server = Server(own_place(folder))
        self.router = self.server.router
        (self.sources,) = [one for one in self.server.sources if isinstance(one, SourceListener)]
        self._wanted: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._waker = Waker()
        self.server.loop.add(self._waker, self._do, URGENT)
        self._thread = threading.Thread(target=self.server.run)
        self._thread.start()

    def do(self, work: Callable[[], T]) -> T:
        """Runs `work` in the broker's thread. Returns its result."""
        return self.begin(work).result(PATIENCE)

    def begin(self, work: Callable[[], T]) -> Future[T]:
        """Schedules `work` in the broker's thread. Returns a future."""
        done: Future[T] = Future()
        self._wanted.append((done, work))
        self._waker.wake()
        return done

    def daemon(self, uid: int, link: Link) -> Association:
        """Registers a daemon."""
        return self.do(lambda: self.router.helo(uid, 4000 + uid, 1, link, self.server.loop.now))

    def gone(self, association: Association) -> None:
        self.do(lambda: self.router.gone(association))

    def _do(self) -> None:
        self._waker.heard()
        while self._wanted:
            done, work = self._wanted.popleft()
            done.set_result(work())

    def close(self) -> None:
        self.server.stop()
        self._thread.join(PATIENCE)
        self._waker.close()

"""Listens for daemons that register, and passes each both ends of a link of its own (docs/protocol.md)."""

from __future__ import annotations

import os
import socket
from collections import Counter
from pathlib import Path

from upcall.broker.daemon_link import DaemonLink
from upcall.core.router import Router
from upcall.kernel.local import unread_by_peer
from upcall.kernel.netlink import give_pair, is_control
from upcall.process.listener import Connection, Listener
from upcall.process.log import EventLog
from upcall.process.loop import Loop
from upcall.process.people import People
from upcall.wire.envelope import HELO, pack_control, pack_response, refusal


class DaemonConnection(Connection):
    """A connection of a daemon. The daemon requests a link once; the link is closed with the connection."""

    def __init__(self, listener: Registration, connection: socket.socket) -> None:
        super().__init__(listener, connection)
        self._registration = listener
        self.link: DaemonLink | None = None

    def _take(self, data: bytes) -> None:
        if self.link is None and is_control(data, HELO):
            self._registration.offer(self)
        else:
            self._registration.reject("message", self.uid, self.pid)
            self.close()

    @property
    def registered(self) -> bool:
        """Whether the daemon has sent HELO on its link and is registered."""
        return self.link is not None and self.link.association is not None

    def tell(self, data: bytes) -> None:
        """Sends a HELO, a QUIT or a refusal without blocking; drops it if the daemon's socket buffer is full."""
        if self.open:
            try:
                self.socket.send(data, socket.MSG_DONTWAIT)
            except OSError:
                return

    def close(self) -> None:
        super().close()
        if self.link is not None:
            self.link.connection_closed()


class Registration(Listener):
    """The socket for registering, open to all uids. A daemon can be registered for its own uid only."""

    name = "registration"
    mode = 0o666
    in_all = 4096  # connections; registered daemons have a lower limit: see Router.refuses
    idle = 5.0  # seconds, the time-out for registering

    def __init__(self, loop: Loop, router: Router, log: EventLog, people: People, path: Path) -> None:
        super().__init__(loop, router, log, people, path)
        self._junk: Counter[str] = Counter()

    def make(self, accepted: socket.socket) -> Connection:
        return DaemonConnection(self, accepted)

    def busy(self, connection: Connection) -> bool:
        """Returns whether the connection must stay: its daemon is registered, or has not yet received its link. An
        unread link counts as descriptors in flight of root's, which the limit of connections per person bounds."""
        if not isinstance(connection, DaemonConnection) or connection.link is None:
            return False
        return connection.registered or unread_by_peer(connection.socket) > 0

    def evictable(self, connection: Connection) -> bool:
        return not self.busy(connection)

    def reject(self, on: str, uid: int, pid: int, by_uid: int = -1, by_pid: int = -1) -> None:
        """Counts and logs a message that its sender had no right to send. `uid`, `pid`: the owner of the connection or
        link; `by_uid`, `by_pid`: the sender, if that is another process."""
        self._junk[on] += 1
        by = {} if by_pid < 0 and by_uid < 0 else {"by_uid": by_uid, "by_pid": by_pid}
        self.log("message-rejected", on=on, uid=uid, pid=pid, **by)

    def refused(self, connection: DaemonConnection, why: str) -> None:
        """Counts and logs a daemon that exceeds the limits."""
        person, router = connection.person, self.router
        self._junk["limit"] += 1
        self.log(
            "registration-refused", uid=connection.uid, pid=connection.pid, why=why, person=person,
            registered=router.daemons_of(person), of=router.limits.daemons_per_person,
            in_all=len(router.registry), of_all=router.limits.daemons,
        )  # fmt: skip

    def status(self, uid: int | None) -> dict[str, object]:
        return {} if uid is not None else {"junk": dict(self._junk)}

    def close(self) -> None:
        """Closes the links of all daemons, then the socket."""
        for association in self.router.registry:
            association.link.close()
        super().close()

    def offer(self, connection: DaemonConnection) -> None:
        """Makes a link and passes it to the daemon, which is registered once it sends HELO on it: see DaemonLink."""
        uid, pid = connection.uid, connection.pid
        if os.geteuid() != 0 and uid != os.geteuid():
            self.reject("uid", uid, pid)
            connection.close()
            return
        if why := self.router.refuses(uid):
            self.refused(connection, why)
            connection.tell(pack_response(0, 0, refusal(why)))
            connection.close()
            return
        try:
            link = DaemonLink(self, connection)
        except OSError as error:  # the process has ended, or no descriptor is free
            self.log("registration-failed", uid=uid, pid=pid, why=error)
            connection.close()
            return
        connection.link = link
        try:
            give_pair(connection.socket, pack_control(HELO), *link.ends)
        except OSError as error:
            self.log("registration-failed", uid=uid, pid=pid, why=error)
            connection.close()

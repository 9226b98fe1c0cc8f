"""The broker's process: registration, the daemons, and the loop around them.

Threads: one runs everything; one writes the log; opening /dev/ecryptfs for a uid borrows a third for a moment.
Ownership: every descriptor belongs to one object here, which takes it out of the loop before closing it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import math
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from upcall.broker.core import Broker
from upcall.broker.devices import Devices, OpenDevice
from upcall.broker.loop import REGISTRATION, URGENT, Loop
from upcall.broker.requesters import Requesters
from upcall.errors import PeerError
from upcall.kernel.local import unlink_quietly
from upcall.kernel.miscdev import Miscdev
from upcall.kernel.netlink import SYSTEM_PORTID, NetlinkSocket, Packet, bound_to
from upcall.kernel.process import harden, prefer_us, raise_descriptor_limit, real_uid_of, stay_in_memory
from upcall.log import EventLog
from upcall.registry import Association
from upcall.runtime import SYSTEM_FOLDER, Place, own_place, publish
from upcall.service import SERVICES, Service, with_contexts
from upcall.wire.netlink import HEADER, HELO, QUIT, RESPONSE, pack_control, take_message

_HELLOS_PER_TURN, _HELLOS_PAUSE = 16, 0.002
_JUNK_IN_A_ROW, _JUNK_PAUSE = 8, 0.02
_LAST_WORDS = 256


class _Pidfd:
    """Readable once the process has ended (pidfd_open(2))."""

    def __init__(self, pid: int) -> None:
        self._fd = os.pidfd_open(pid)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        os.close(self._fd)


class DaemonLink:
    """The way to one daemon: a socket that only it can send to, and an eye on whether it lives."""

    def __init__(self, server: Server, uid: int, pid: int, portid: int) -> None:
        """OSError if the process or its socket is gone already."""
        self._server, self.uid, self.pid, self.portid = server, uid, pid, portid
        self.association: Association | None = None
        self._junk = 0  # useless messages in a row
        self._alive = _Pidfd(pid)
        try:
            self.socket = NetlinkSocket()
            self.socket.connect(portid)
        except OSError:
            self._alive.close()
            raise

    def start(self, association: Association) -> None:
        self.association = association
        if not self.socket.closed:  # it may have died while it was told what is pending
            self._server.loop.add(self.socket, self._on_readable, self.uid)
            self._server.loop.add(self._alive, self._on_exit, URGENT)

    def send(self, data: bytes) -> bool:
        return self.socket.send(data)

    def hello(self) -> bool:
        return self.socket.send(pack_control(HELO))

    def close(self) -> None:
        if self.socket.closed:
            return
        for source in (self.socket, self._alive):
            self._server.loop.remove(source)
            source.close()
        self._server.after_close(self.uid)

    def _on_exit(self) -> None:
        assert self.association is not None  # noqa: S101 - set before the loop knows us
        for _ in range(_LAST_WORDS):  # what it had answered before it ended still counts
            if self.socket.closed or (packet := self.socket.receive()) is None:
                break
            self._take(packet)
        self._server.log("daemon-exited", uid=self.uid, pid=self.pid)
        self._server.broker.gone(self.association)

    def _on_readable(self) -> None:
        """One message per turn: fair to everybody, and no second call only to learn that there is no more."""
        packet = self.socket.receive()
        if packet is None or self._take(packet):
            self._junk = 0
            return
        self._junk += 1
        if self._junk >= _JUNK_IN_A_ROW:
            self._junk = 0
            self._server.loop.mute(self.socket, self._server.now + _JUNK_PAUSE)

    def _take(self, packet: Packet) -> bool:
        """One message; False if it was of no use."""
        association, broker = self.association, self._server.broker
        assert association is not None  # noqa: S101 - set before the loop knows us
        data = packet.data
        kind = HEADER.unpack_from(data)[1] if len(data) >= HEADER.size else 0
        if packet.uid != self.uid or packet.pid != self.pid:
            # A child that inherited the socket, or one that was given it: it is not who registered.
            self._server.reject("uid" if packet.uid != self.uid else "pid", packet)
            return False
        if kind == RESPONSE:
            return broker.answered(association, data)
        if kind == QUIT and len(data) == HEADER.size:
            self._server.log("quit", uid=self.uid, pid=self.pid)
            broker.quit(association)
            return True
        if kind == HELO and len(data) == HEADER.size:
            return True
        self._server.reject("message", packet)
        return False


class Server:
    """Everything that `upcall broker` is."""

    def __init__(
        self,
        place: Place,
        services: Mapping[str, Service] = SERVICES,
        log: EventLog | None = None,
        device: OpenDevice | None = None,
    ) -> None:
        """`device` opens /dev/ecryptfs for a uid; None where there is no right to it. OSError, UsageError."""
        self.place = place
        self.log = log or EventLog("upcall-broker")
        self.loop = Loop()
        self.broker = Broker(services, self.log)
        self.junk: Counter[str] = Counter()
        # Seconds, monotonic. The clock is read once a turn; nothing that is read in this turn can have been there
        # before `since`, the turn before.
        self.now = self.since = time.monotonic()
        self._system = os.geteuid() == 0
        self._stopping = False
        self.requesters = Requesters(self, place.socket)
        self.devices = Devices(self, device) if device is not None else None
        self.registration = self._bind()
        publish(place, self.registration.portid)
        self.loop.add(self.registration, self._on_registration, REGISTRATION)
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_writer.setblocking(False)
        self.loop.add(self._wake_reader, self._on_signal, URGENT)

    def _bind(self) -> NetlinkSocket:
        """The system's broker has a documented portid; if somebody sits there, any other, written down."""
        if not self._system or self.place.folder != SYSTEM_FOLDER:
            return NetlinkSocket()
        try:
            return NetlinkSocket(SYSTEM_PORTID)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            self.log("portid-taken", portid=SYSTEM_PORTID, by=bound_to(SYSTEM_PORTID))
            return NetlinkSocket()

    # --- registration --------------------------------------------------------------------------------------

    def _on_registration(self) -> None:
        for _ in range(_HELLOS_PER_TURN):
            packet = self.registration.receive()
            if packet is None:
                return
            self._on_hello(packet)
        # Whoever shouts here waits here: those who are registered have sockets of their own.
        self.loop.mute(self.registration, self.now + _HELLOS_PAUSE)

    def _on_hello(self, packet: Packet) -> None:
        try:
            message = take_message(packet.data)
        except PeerError:
            self.reject("message", packet)
            return
        if message.type != HELO or message.data is not None:
            self.reject("message", packet)
        elif not self._system and packet.uid != os.geteuid():
            self.reject("uid", packet)
        elif real_uid_of(packet.pid) != packet.uid:
            # Netlink does not translate pids: this one is of another pid namespace, or has ended already.
            self.reject("pid", packet)
        else:
            self._register(packet)

    def _register(self, packet: Packet) -> None:
        known = self.broker.registry.get(packet.uid)
        if known is not None and (known.pid, known.portid) == (packet.pid, packet.portid):
            try:
                known.link.send(pack_control(HELO))  # it did not hear us the first time
            except ConnectionError:
                self.broker.gone(known)  # the process lives, but has closed its socket since
            return
        try:
            link = DaemonLink(self, packet.uid, packet.pid, packet.portid)
        except OSError as error:
            self.log("hello-unanswered", uid=packet.uid, pid=packet.pid, why=error)
            return
        try:
            heard = link.hello()
        except ConnectionError:
            heard = False
        if not heard:
            self.log("hello-unanswered", uid=packet.uid, pid=packet.pid, why="its socket takes nothing")
            link.close()
            return
        self.log("registered", uid=packet.uid, pid=packet.pid, portid=packet.portid)
        association = self.broker.helo(packet.uid, packet.pid, packet.portid, link, self.now)
        link.start(association)
        if self.devices is not None and self.broker.registry.get(packet.uid) is association:
            self.devices.open(packet.uid)

    def reject(self, on: str, packet: Packet) -> None:
        """Counts what nobody may say."""
        self.junk[on] += 1
        self.log("message-rejected", on=on, uid=packet.uid, pid=packet.pid, portid=packet.portid)

    def after_close(self, uid: int) -> None:
        """A link was closed: without a daemon, a uid's device is of no use."""
        if self.devices is not None and self.broker.registry.get(uid) is None:
            self.devices.close(uid)

    # --- running -------------------------------------------------------------------------------------------

    def stop(self, *_: object) -> None:
        """Ends `run` soon; from a signal handler or another thread."""
        self._stopping = True
        with contextlib.suppress(BlockingIOError):
            self._wake_writer.send(b"x")

    def _on_signal(self) -> None:
        self._wake_reader.recv(16)

    def run(self) -> None:
        """Serves until `stop`, then refuses what is owed and closes."""
        self.log("ready", folder=self.place.folder, portid=self.registration.portid)
        try:
            while not self._stopping:
                wake = self._next_wake()
                ready = self.loop.wait(-1 if wake == math.inf else max(0.0, wake - self.now))
                self.since, self.now = self.now, time.monotonic()
                self.loop.run(ready, self.now)
                if self.now >= wake:
                    self.broker.expire(self.now)
                    self.loop.unmute(self.now)
                    if self.devices is not None:
                        self.devices.retry(self.now)
        finally:
            self._close()

    def _next_wake(self) -> float:
        wake = min(self.broker.next_wake(), self.loop.next_wake())
        return wake if self.devices is None else min(wake, self.devices.next_wake(self.now))

    def _close(self) -> None:
        for association in self.broker.registry:
            self.broker.refuse_all(association.uid, "closing")
        if self.devices is not None:
            self.devices.close_all()
        unlink_quietly(self.place.portid_file)
        self.requesters.close()
        for association in self.broker.registry:
            association.link.close()
        for source in (self.registration, self._wake_reader):
            self.loop.remove(source)
            source.close()
        self._wake_writer.close()
        self.loop.close()
        self.log("closed")
        self.log.flush()

    def status(self, uid: int | None) -> dict[str, object]:
        """For `upcall status`: of one uid, or of all."""
        found = self.broker.status(self.now, uid)
        found["broker"] = {"pid": os.getpid(), "portid": self.registration.portid, "uid": os.geteuid()}
        if uid is None:
            found["junk"] = dict(self.junk)
            found["kernel"] = {} if self.devices is None else dict(self.devices.counts)
        found["devices"] = [] if self.devices is None else self.devices.status(uid)
        return found


def main(folder: Path | None = None, device: Path | None = None, contexts: int | None = None) -> None:
    """Runs a broker in this process until SIGTERM or SIGINT. OSError, UsageError before it is ready."""
    harden()
    raise_descriptor_limit()
    prefer_us()
    open_device = None
    if device is not None:
        open_device = functools.partial(Miscdev, path=device)
        stay_in_memory()  # a page that comes back from a slow disk can take longer than the kernel's 3 s
    services = SERVICES if contexts is None else with_contexts(contexts)
    server = Server(own_place(folder), services, device=open_device)
    signal.signal(signal.SIGTERM, server.stop)
    signal.signal(signal.SIGINT, server.stop)
    gc.freeze()
    server.run()

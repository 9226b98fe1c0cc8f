"""Simulates broker, daemon and requester in the test's process, over real sockets: they send what a test specifies."""

from __future__ import annotations

import os
import select
import socket
import time
from pathlib import Path
from typing import Self

from upcall.core.messages import Answer, Refusal, Requester
from upcall.kernel.local import connect, listen
from upcall.kernel.netlink import NetlinkSocket, Packet, give_pair, pair, take_pair
from upcall.process.paths import Place
from upcall.testing.processes import PATIENCE, NotInTime, until
from upcall.wire.envelope import (
    HELO,
    MAX_MESSAGE,
    QUIT,
    REQUEST,
    Envelope,
    Response,
    pack_control,
    pack_request,
    pack_response,
    take_message,
    take_request,
    take_response,
)


class PlayedBroker:
    """A broker that registers one daemon and sends it what a test specifies."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.listener = listen(Place(folder).registration_socket, 0o666)
        self.listener.settimeout(PATIENCE)

    def register(self) -> None:
        """Waits for a daemon and registers it."""
        self.connection, _ = self.listener.accept()
        self.connection.settimeout(PATIENCE)
        if take_message(self.connection.recv(MAX_MESSAGE)).type != HELO:
            raise NotInTime("something came, but not HELO")
        self.socket, self.far = pair()
        give_pair(self.connection, pack_control(HELO), self.socket, self.far)
        packet = until(self.socket.receive, "a HELO")
        if take_message(packet.data).type != HELO:
            raise NotInTime("something came on the link, but not HELO")
        self.socket.send(pack_control(HELO))

    @property
    def portid(self) -> int:
        """The portid of the daemon's end of the link."""
        return self.far.portid

    def ask(self, seq: int, body: bytes, service: str = "key", timeout: float = 5.0, kind: int = REQUEST) -> None:
        deadline = int((time.monotonic() + timeout) * 1e9)
        self.socket.send(pack_request(Envelope(seq, seq, service, Requester(0, 0), deadline, body), kind))

    def response(self) -> Response:
        def look() -> Response | None:
            packet = self.socket.receive()
            return None if packet is None else take_response(packet.data)

        return until(look, "a response")

    def quit(self) -> None:
        """Sends QUIT to the daemon, as when a newer one takes over."""
        self.socket.send(pack_control(QUIT))
        self.connection.send(pack_control(QUIT))

    def close(self) -> None:
        """As when it ends."""
        self.listener.close()
        for one in (self.socket, self.far, self.connection):
            one.close()


class PlayedDaemon:
    """A daemon, connected to the broker in `folder`. Answers no request by itself."""

    def __init__(self, folder: Path, register: bool = True) -> None:
        self.folder = folder
        self.connection: socket.socket | None = None
        self.socket: NetlinkSocket  # both ends of the link: the daemon's, then the broker's
        self.far: NetlinkSocket
        if register:
            self.register()

    def register(self) -> None:
        """Registers: sends HELO and waits for the broker's."""
        self.hello()
        self.helo_heard()

    def hello(self) -> None:
        """Requests a link."""
        place = Place(self.folder)
        self.connection = connect(place.registration_socket, place.owners())
        self.connection.settimeout(PATIENCE)
        self.connection.send(pack_control(HELO))

    def helo_heard(self) -> None:
        """Receives the link, sends HELO on it, and waits for the broker's."""
        self.link_taken()
        self.socket.send(pack_control(HELO))
        if take_message(self.receive().data).type != HELO:
            raise NotInTime("the broker said something, but not HELO")

    def link_taken(self) -> None:
        """Receives the link. The daemon is registered only after it has sent HELO on it."""
        if self.connection is None:
            raise NotInTime("no link was asked for")
        _, far, mine = take_pair(self.connection)
        if mine is None or far is None:
            raise NotInTime("the broker said something, but gave no link")
        self.socket, self.far = mine, far

    @property
    def broker(self) -> int:
        """The portid of the broker's end of the link."""
        return self.far.portid

    def receive(self, timeout: float = PATIENCE) -> Packet:
        if not select.select([self.socket], [], [], timeout)[0]:
            raise NotInTime(f"the broker has said nothing within {timeout} s")
        packet = self.socket.receive()
        if packet is None:
            raise NotInTime("readable, but nothing to read")
        return packet

    def request(self, timeout: float = PATIENCE) -> Envelope:
        """Waits for the next request. NotInTime after `timeout` seconds."""
        return take_request(self.receive(timeout).data)

    def quit_heard(self, timeout: float = PATIENCE) -> bool:
        """Waits for the next message. Returns whether it is QUIT."""
        return take_message(self.receive(timeout).data).type == QUIT

    def silent(self) -> bool:
        """Returns whether no message waits in the socket's queue."""
        return not select.select([self.socket], [], [], 0)[0]

    def answer(self, request: Envelope, outcome: Answer | Refusal) -> None:
        self.send(pack_response(request.seq, request.index, outcome))

    def send(self, data: bytes) -> None:
        self.socket.send(data)

    def quit(self) -> None:
        self.send(pack_control(QUIT))

    def disconnected(self) -> bool:
        """Waits until the broker has closed the connection, or a time-out. Returns whether it has."""
        if self.connection is None:
            return True
        try:
            while self.connection.recv(64):
                pass
        except TimeoutError:
            return False
        except OSError:
            return True
        return True

    def close(self) -> None:
        """Closes all sockets, as the end of a daemon's process does."""
        for one in (getattr(self, "socket", None), getattr(self, "far", None), self.connection):
            if one is not None:
                one.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PlayedRequester:
    """A connection to a broker that sends without waiting for answers."""

    def __init__(self, folder: Path, timeout: float = PATIENCE) -> None:
        self.socket: socket.socket = connect(Place(folder).socket, frozenset({0, os.geteuid()}))
        self.socket.settimeout(timeout)
        self._seq = 0

    def ask(
        self,
        body: bytes,
        service: str = "key",
        timeout: float = PATIENCE,
        uid: int | None = None,
        wants_why: bool = False,
    ) -> int:
        """Sends a request; returns its sequence number. `timeout`: seconds until its deadline."""
        self._seq += 1
        requester = Requester(os.getuid() if uid is None else uid, 0)
        deadline = int((time.monotonic() + timeout) * 1e9)
        self.send(pack_request(Envelope(self._seq, self._seq * 3, service, requester, deadline, body, wants_why)))
        return self._seq

    def send(self, data: bytes) -> None:
        self.socket.send(data)

    def response(self) -> Response:
        """Waits for the next answer. NotInTime; ConnectionError if the broker has closed the connection."""
        try:
            data = self.socket.recv(MAX_MESSAGE)
        except TimeoutError:
            raise NotInTime("the broker has not answered") from None
        if not data:
            raise ConnectionError("the broker has closed the connection")
        return take_response(data)

    def reason(self) -> str:
        """Waits for the next answer. Returns the reason of a refusal, otherwise "answered"."""
        outcome = self.response().outcome
        return outcome.reason if isinstance(outcome, Refusal) else "answered"

    def closed(self) -> bool:
        """Waits until the broker has closed the connection, or a time-out; discards answers. Returns whether it
        has."""
        try:
            while self.socket.recv(MAX_MESSAGE):
                pass
        except ConnectionError:
            return True
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

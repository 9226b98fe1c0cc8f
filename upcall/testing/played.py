"""Simulates broker, daemon and requester, which send what a test wants, in its process, over real sockets."""

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
    """Registers one daemon and says whatever the test wants."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.listener = listen(Place(folder).registration_socket, 0o666)
        self.listener.settimeout(PATIENCE)

    def register(self) -> None:
        """The next daemon that asks for it."""
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
        """The daemon's."""
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
        """Tells the daemon that it is not needed any more."""
        self.socket.send(pack_control(QUIT))
        self.connection.send(pack_control(QUIT))

    def close(self) -> None:
        """As when it ends."""
        self.listener.close()
        for one in (self.socket, self.far, self.connection):
            one.close()


class PlayedDaemon:
    """Speaks to the broker in `folder`. Nothing is answered but what the test answers."""

    def __init__(self, folder: Path, register: bool = True) -> None:
        self.folder = folder
        self.connection: socket.socket | None = None
        self.socket: NetlinkSocket  # our end of the link, and the broker's
        self.far: NetlinkSocket
        if register:
            self.register()

    def register(self) -> None:
        """HELO, and the broker's HELO in its turn."""
        self.hello()
        self.helo_heard()

    def hello(self) -> None:
        """Asks for a link."""
        place = Place(self.folder)
        self.connection = connect(place.registration_socket, place.owners())
        self.connection.settimeout(PATIENCE)
        self.connection.send(pack_control(HELO))

    def helo_heard(self) -> None:
        """Takes the link, says HELO on it, and waits for the broker's."""
        self.link_taken()
        self.socket.send(pack_control(HELO))
        if take_message(self.receive().data).type != HELO:
            raise NotInTime("the broker said something, but not HELO")

    def link_taken(self) -> None:
        """Takes the link; the broker does not know us before it hears HELO on it."""
        if self.connection is None:
            raise NotInTime("no link was asked for")
        _, far, mine = take_pair(self.connection)
        if mine is None or far is None:
            raise NotInTime("the broker said something, but gave no link")
        self.socket, self.far = mine, far

    @property
    def broker(self) -> int:
        """The portid of the broker's end."""
        return self.far.portid

    def receive(self, timeout: float = PATIENCE) -> Packet:
        if not select.select([self.socket], [], [], timeout)[0]:
            raise NotInTime(f"the broker has said nothing within {timeout} s")
        packet = self.socket.receive()
        if packet is None:
            raise NotInTime("readable, but nothing to read")
        return packet

    def request(self, timeout: float = PATIENCE) -> Envelope:
        """The next request."""
        return take_request(self.receive(timeout).data)

    def quit_heard(self, timeout: float = PATIENCE) -> bool:
        """Whether the next message is QUIT."""
        return take_message(self.receive(timeout).data).type == QUIT

    def silent(self) -> bool:
        """Whether nothing is waiting to be read."""
        return not select.select([self.socket], [], [], 0)[0]

    def answer(self, request: Envelope, outcome: Answer | Refusal) -> None:
        self.send(pack_response(request.seq, request.index, outcome))

    def send(self, data: bytes) -> None:
        self.socket.send(data)

    def quit(self) -> None:
        self.send(pack_control(QUIT))

    def disconnected(self) -> bool:
        """Whether the broker has ended the connection. Waits for it."""
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
        """As when it ends, but for the process."""
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

    def ask(self, body: bytes, service: str = "key", timeout: float = PATIENCE, uid: int | None = None) -> int:
        """Sends a request; gives its seq."""
        self._seq += 1
        requester = Requester(os.getuid() if uid is None else uid, 0)
        deadline = int((time.monotonic() + timeout) * 1e9)
        self.send(pack_request(Envelope(self._seq, self._seq * 3, service, requester, deadline, body)))
        return self._seq

    def send(self, data: bytes) -> None:
        self.socket.send(data)

    def response(self) -> Response:
        """The next answer; NotInTime, ConnectionError if there will be none."""
        try:
            data = self.socket.recv(MAX_MESSAGE)
        except TimeoutError:
            raise NotInTime("the broker has not answered") from None
        if not data:
            raise ConnectionError("the broker has closed the connection")
        return take_response(data)

    def reason(self) -> str:
        """The reason of the next answer, which is a refusal; "answered" if it is none."""
        outcome = self.response().outcome
        return outcome.reason if isinstance(outcome, Refusal) else "answered"

    def closed(self) -> bool:
        """Whether the broker has closed the connection, whatever may be left to read. Waits for it."""
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

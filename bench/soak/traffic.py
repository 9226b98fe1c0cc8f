"""`python -m bench.soak.traffic KIND SECONDS ARGUMENTS...`: makes requests or disturbs, and counts the outcomes.

Prints a JSON object with the counts every second, and at the end. Each request ends in exactly one of "answered",
"refused", "lost" (no answer in time) and "left" (its requester ended before). "twice": unexpected answers. "wrong":
answers with a wrong content.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import select
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.packets import new_file_key
from bench.soak.broker import AUTHORISATION, UID, described
from upcall.client import Client, NoBroker
from upcall.core.errors import Refused
from upcall.core.messages import Answer, Requester
from upcall.kernel.local import connect
from upcall.process.paths import Place
from upcall.protocols.ecryptfs.packets import (
    MAX_READ,
    REQUEST,
    STATUS_OK,
    TAG_66,
    TAG_67,
    Ask,
    Frame,
    pack_ask,
    pack_frame,
    take_frame,
    take_reply,
)
from upcall.protocols.request_key import messages as requestkey
from upcall.protocols.request_key.messages import Upcall, pack_upcall
from upcall.testing.played import PlayedRequester
from upcall.wire.envelope import HELO, MAX_MESSAGE, Envelope, pack_control, pack_request, take_response

_KERNEL_PATIENCE = 3.0  # seconds, the time-out of eCryptfs
_INFLIGHT = 8  # pending requests of the kernel
_PAUSE = 0.002  # seconds between two visitors, and between two disturbances


class Counts:
    """Counts outcomes, and prints them every second."""

    def __init__(self, seconds: float) -> None:
        self.of: Counter[str] = Counter()
        self._end = time.monotonic() + seconds
        self._due = 0.0

    def going(self) -> bool:
        now = time.monotonic()
        if now >= self._due:
            self._due = now + 1
            self.say()
        return now < self._end

    def say(self) -> None:
        print(json.dumps(self.of), flush=True)

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """A context for one request, which counts its outcome."""
        self.of["sent"] += 1
        try:
            yield
            self.of["answered"] += 1
        except Refused as refused:
            self.of["refused"] += 1
            self.of[refused.reason] += 1
        except (TimeoutError, NoBroker, ConnectionError):
            self.of["lost"] += 1


# --- processes -----------------------------------------------------------------------------------------------


def keys(counts: Counts, folder: str, *signatures: str) -> None:
    """Wraps and unwraps with each key in turn."""
    with Client(Path(folder)) as client:
        for signature in itertools.cycle(signatures):
            if not counts.going():
                return
            key = os.urandom(random.choice((16, 24, 32)))
            wrapped, clear = b"", key
            with counts.one():
                wrapped = client.wrap(signature, key)
            if wrapped:
                with counts.one():
                    clear = client.unwrap(signature, wrapped)
            counts.of["wrong"] += clear != key


def visitors(counts: Counts, folder: str, signature: str) -> None:
    """Connects, makes one request, and disconnects; every third time without waiting for the answer."""
    packet = pack_ask(Ask(TAG_66, signature, new_file_key()))
    for number in itertools.count():
        if not counts.going():
            return
        with contextlib.suppress(BlockingIOError), PlayedRequester(Path(folder)) as requester:  # backlog full
            if number % 3 == 0:
                requester.ask(packet)
                counts.of.update(("sent", "left"))
            else:
                with counts.one():
                    requester.ask(packet)
                    reason = requester.reason()
                    if reason != "answered":
                        raise Refused(reason)
        time.sleep(_PAUSE)


def junk(counts: Counts, folder: str, uid: str = "") -> None:
    """Sends random bytes and truncated messages to every socket that is open to all users. As `uid`, if possible, so
    that the limit of connections per user does not affect others."""
    if uid:
        os.setgroups([])
        os.setresgid(int(uid), int(uid), int(uid))
        os.setresuid(int(uid), int(uid), int(uid))
    place, packet = Place(Path(folder)), pack_ask(Ask(TAG_66, "0" * 16, new_file_key()))
    whole = pack_request(Envelope(1, 1, "key", Requester(os.getuid(), 0), 0, packet))
    kinds: tuple[Callable[[], bytes], ...] = (
        lambda: os.urandom(random.randrange(1, 200)),
        lambda: whole[: random.randrange(1, len(whole))],
        lambda: whole + b"x",
        lambda: pack_control(HELO)[:-1],
        lambda: bytes(MAX_MESSAGE),
    )
    while counts.going():
        data = random.choice(kinds)()
        for path in (place.registration_socket, place.socket):
            with contextlib.suppress(OSError), connect(path, frozenset({0, os.geteuid()})) as connection:
                connection.send(data)
        counts.of["junk"] += 2
        time.sleep(_PAUSE)


# --- the kernel ----------------------------------------------------------------------------------------------


class _Files:
    """Simulates the kernel's side of /dev/ecryptfs: creates files, _INFLIGHT at a time for each uid with a daemon."""

    def __init__(self, counts: Counts, path: str, signatures: dict[int, str]) -> None:
        self._counts, self._signatures = counts, signatures
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(path)
        self._listener.listen()
        self._poll = select.poll()
        self._poll.register(self._listener, select.POLLIN)
        self._devices: dict[int, tuple[socket.socket, int]] = {}  # descriptor -> (socket, uid)
        self._pending: dict[int, tuple[int, float]] = {}  # sequence number -> (descriptor, deadline)
        self._seq = 0

    def run(self) -> None:
        while self._counts.going():
            self._turn()
        end = time.monotonic() + _KERNEL_PATIENCE + 1
        while self._pending and time.monotonic() < end:
            self._turn(more=False)

    def _turn(self, more: bool = True) -> None:
        for fd, _ in self._poll.poll(100):
            if fd == self._listener.fileno():
                self._accept()
            else:
                self._take(fd)
        now = time.monotonic()
        for seq in [seq for seq, (_, until) in self._pending.items() if until < now]:
            del self._pending[seq]
            self._counts.of["lost"] += 1
        if more:
            for fd in tuple(self._devices):
                self._fill(fd)

    def _accept(self) -> None:
        device, _ = self._listener.accept()
        (uid,) = UID.unpack(device.recv(UID.size))
        self._devices[device.fileno()] = device, uid
        self._poll.register(device, select.POLLIN)

    def _fill(self, fd: int) -> None:
        device, uid = self._devices[fd]
        mine = sum(owner == fd for owner, _ in self._pending.values())
        for _ in range(_INFLIGHT - mine):
            self._seq = self._seq % 0xFFFFFFFF + 1
            packet = pack_ask(Ask(TAG_66, self._signatures[uid], new_file_key()))
            try:
                device.send(pack_frame(Frame(REQUEST, self._seq, self._seq % 32, packet)))
            except OSError:
                return  # the device was closed: the next read reports it
            self._counts.of["sent"] += 1
            self._pending[self._seq] = fd, time.monotonic() + _KERNEL_PATIENCE

    def _take(self, fd: int) -> None:
        device, _ = self._devices[fd]
        try:
            data = device.recv(MAX_READ)
        except OSError:
            data = b""
        if not data:
            return self._closed(fd)
        frame = take_frame(data)
        if self._pending.pop(frame.seq, None) is None:
            self._counts.of["twice"] += 1
            return None
        with self._counts.one():
            self._counts.of["sent"] -= 1  # it was counted when it was sent: correct that
            reply = take_reply(frame.data or b"")
            if (reply.tag, reply.status) != (TAG_67, STATUS_OK):
                raise Refused("failed")
        return None

    def _closed(self, fd: int) -> None:
        """Handles the closing of a device. Its requests wait until their time-out, as in the real kernel."""
        device, _ = self._devices.pop(fd)
        self._poll.unregister(device)
        device.close()
        for seq in [seq for seq, (owner, _) in self._pending.items() if owner == fd]:
            del self._pending[seq]
            self._counts.of["left"] += 1


def files(counts: Counts, path: str, *told: str) -> None:
    """Simulates files. `told`: UID=SIGNATURE for each uid with files."""
    _Files(counts, path, {int(uid): signature for uid, signature in (one.split("=") for one in told)}).run()


def forwarders(counts: Counts, folder: str) -> None:
    """Simulates forwarders: for each key a connection, a request and an answer."""
    place = Place(Path(folder))
    for serial in itertools.count(1):
        if not counts.going():
            return
        serial = serial % AUTHORISATION or 1
        key = described(serial, os.getppid())
        words = b"%b;%d;%d;%08x;%b" % (key.type.encode(), *key[1:])
        body = pack_upcall(Upcall(serial, AUTHORISATION + serial, words, b""))
        deadline = int((time.monotonic() + 5) * 1e9)
        with connect(place.request_key_socket, frozenset({os.geteuid()})) as connection, counts.one():
            connection.settimeout(5)
            connection.send(pack_request(Envelope(serial, 0, requestkey.SERVICE, Requester(0, 0), deadline, body)))
            outcome = take_response(connection.recv(MAX_MESSAGE)).outcome
            if not isinstance(outcome, Answer):
                raise Refused(outcome.reason)


KINDS: dict[str, Callable[..., None]] = {
    "keys": keys,
    "visitors": visitors,
    "junk": junk,
    "files": files,
    "forwarders": forwarders,
}


def main(kind: str, seconds: str, *arguments: str) -> None:
    counts = Counts(float(seconds))
    KINDS[kind](counts, *arguments)
    counts.say()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Simulates the kernel's side of /dev/ecryptfs (fs/ecryptfs), including its quirks, without privileges.

It has 32 message contexts and a time-out of 3 s. After the time-out a context is reused, and an unread request becomes
a stale frame of five bytes. It accepts answers whose index and sequence number match, and returns EINVAL for others.
Unlike the real kernel it records answers that would have destroyed a file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from upcall.broker.launcher import COMMAND
from upcall.broker.server import Server
from upcall.broker.settings import Configured
from upcall.core.contexts import Line
from upcall.core.errors import PeerError
from upcall.core.service import Service
from upcall.process.log import EventLog
from upcall.process.paths import Place, own_place
from upcall.process.people import People
from upcall.process.source import MakeSource, Source
from upcall.protocols.catalogue import SERVICES
from upcall.protocols.ecryptfs.packets import (
    MAX_READ,
    MAX_WRITE,
    REQUEST,
    RESPONSE,
    TAG_65,
    Frame,
    check_answer,
    pack_frame,
    take_file_key,
    take_frame,
    take_reply,
)
from upcall.protocols.ecryptfs.source import Devices, OpenDevice
from upcall.protocols.request_key.source import Forwarders, Kernel
from upcall.testing.broker import strangers
from upcall.testing.processes import PATIENCE, NotInTime


class PlayedUpcall:
    """A process that waits in the kernel for an answer."""

    def __init__(self, packet: bytes, deadline: float) -> None:
        self.packet, self.deadline = packet, deadline
        self.index = self.seq = -1
        self.answer: bytes | None = None
        self.error = 0
        self._settled = threading.Event()

    def settle(self, answer: bytes | None, error: int = 0) -> None:
        self.answer, self.error = answer, error
        self._settled.set()

    @property
    def settled(self) -> bool:
        return self._settled.is_set()

    def result(self) -> bytes:
        """Waits, and returns the key of the answer, wrapped or in clear. OSError as the process would get it: EIO,
        ENOMEM, ENOTCONN."""
        if not self._settled.wait(max(0.0, self.deadline - time.monotonic())) and not self.settled:
            self.settle(None, errno.EIO)
        if self.answer is None:
            raise OSError(self.error, os.strerror(self.error))
        try:
            reply = take_reply(self.answer)
            if reply.tag != self.packet[0] + 1 or reply.status:
                raise PeerError("answer", "a failure")
            if reply.tag == TAG_65:
                take_file_key(reply.content)
        except PeerError:
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from None
        return reply.content


class PlayedDevice:
    """/dev/ecryptfs, opened by one uid. Supports level-triggered polling, as the real one."""

    def __init__(self, kernel: PlayedKernel, uid: int) -> None:
        self._kernel, self.uid = kernel, uid
        self.fd = os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_CLOEXEC)
        self.queue: deque[bytes | PlayedUpcall] = deque()

    def fileno(self) -> int:
        return self.fd

    def put(self, what: bytes | PlayedUpcall) -> None:
        self.queue.append(what)
        os.eventfd_write(self.fd, 1)

    def readable(self) -> bool:
        return bool(select.select([self.fd], [], [], 0)[0])

    def read(self) -> bytes:
        if not select.select([self.fd], [], [], PATIENCE)[0]:
            raise NotInTime("a read that would have hung: the device was not readable")
        os.eventfd_read(self.fd)
        return self._kernel.hand_out(self.queue.popleft())

    def write(self, frame: bytes, /) -> None:
        self._kernel.take(frame)

    def close(self) -> None:
        if self.fd >= 0:
            self._kernel.closed(self)
            os.close(self.fd)
            self.fd = -1


class PlayedKernel:
    """The simulated kernel. Pass `open` to a Server as its device. `ask` makes a request, as a process does that opens
    or creates a file. Thread-safe. `contexts`: message contexts. `timeout`: seconds."""

    def __init__(self, contexts: int = 32, timeout: float = 3.0) -> None:
        self.timeout = timeout
        self.cannot_open = 0  # errno with which `open` fails; 0: it does not
        self.refused: list[bytes] = []  # frames that were refused with EINVAL
        self.lost: list[bytes] = []  # accepted answers that would have destroyed a file
        self._lock = threading.Lock()
        self._contexts: list[PlayedUpcall | None] = [None] * contexts
        self._devices: dict[int, PlayedDevice] = {}
        self._seq = 0

    # --- the broker's side ---------------------------------------------------------------------------------

    def open(self, uid: int) -> PlayedDevice:
        """Opens the device. OSError EINVAL while this uid has it open already."""
        with self._lock:
            code = self.cannot_open or (errno.EINVAL if uid in self._devices else 0)
            if code:
                raise OSError(code, os.strerror(code))
            self._devices[uid] = PlayedDevice(self, uid)
            return self._devices[uid]

    def closed(self, device: PlayedDevice) -> None:
        """Closes a device. As in the real kernel, requests in its queue wait until their time-out."""
        with self._lock:
            del self._devices[device.uid]

    def hand_out(self, what: bytes | PlayedUpcall) -> bytes:
        with self._lock:
            self._expire()
            if isinstance(what, bytes):
                return what
            if what not in self._contexts:
                return pack_frame(Frame(REQUEST, what.seq))
            data = pack_frame(Frame(REQUEST, what.seq, what.index, what.packet))
            return data if len(data) <= MAX_READ else b""

    def take(self, data: bytes) -> None:
        """Accepts an answer. OSError EINVAL if no waiting request matches."""
        with self._lock:
            self._expire()
            upcall = self._fitting(data)
            if upcall is None:
                self.refused.append(data)
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            self._contexts[upcall.index] = None
        answer = take_frame(data).data or b""
        self._note(upcall.packet, answer)
        upcall.settle(answer)

    def _fitting(self, data: bytes) -> PlayedUpcall | None:
        try:
            frame = take_frame(data)
        except PeerError:
            return None
        if frame.type != RESPONSE or frame.index is None or len(data) > MAX_WRITE:
            return None
        upcall = self._contexts[frame.index] if frame.index < len(self._contexts) else None
        return upcall if upcall is not None and upcall.seq == frame.seq else None

    def _note(self, asked: bytes, answer: bytes) -> None:
        """Records an answer that would have destroyed a file: the real kernel writes the content of any tag 67 with
        status 0 to the file."""
        if answer[1:2] == b"\0":
            try:
                check_answer(asked, answer)
            except PeerError:
                self.lost.append(answer)

    def _expire(self) -> None:
        now = time.monotonic()
        for index, upcall in enumerate(self._contexts):
            if upcall is not None and (upcall.deadline <= now or upcall.settled):
                self._contexts[index] = None

    # --- the processes' side -------------------------------------------------------------------------------

    def ask(self, uid: int, packet: bytes) -> PlayedUpcall:
        """Makes a request with this packet for a process of `uid`; does not block. See `PlayedUpcall.result`: ENOTCONN
        if the device is not open, ENOMEM without a free context."""
        upcall = PlayedUpcall(packet, time.monotonic() + self.timeout)
        with self._lock:
            self._expire()
            device = self._devices.get(uid)
            free = [index for index, waiting in enumerate(self._contexts) if waiting is None]
            if device is None or not free:
                upcall.settle(None, errno.ENOTCONN if device is None else errno.ENOMEM)
                return upcall
            self._seq += 1
            upcall.index, upcall.seq = free[0], self._seq
            self._contexts[upcall.index] = upcall
            device.put(upcall)
        return upcall

    def give_up(self, upcall: PlayedUpcall) -> None:
        """Ends a request as its time-out does, at once."""
        upcall.deadline = 0.0
        upcall.settle(None, errno.EIO)

    def say(self, uid: int, data: bytes) -> None:
        """Makes the device return these bytes. b"": as a read that a signal interrupts."""
        with self._lock:
            self._devices[uid].put(data)

    def is_open(self, uid: int) -> bool:
        return uid in self._devices

    def unread(self, uid: int) -> int:
        return len(self._devices[uid].queue)


def sources(
    place: Place, device: OpenDevice | None = None, keys: Kernel | None = None, owners: Mapping[str, int] = {}
) -> list[MakeSource]:
    """Returns the constructors of the sources of eCryptfs and request_key, for the given devices only."""
    make: list[MakeSource] = []
    if device is not None:
        make.append(lambda loop, router, log, people: Devices(loop, router, log, device))
    if keys is not None:
        path, me = place.request_key_socket, os.geteuid()
        make.append(lambda loop, router, log, people: Forwarders(loop, router, log, people, path, keys, owners, me))
    return make


S = TypeVar("S", bound=Source)


def source_of(server: Server, kind: type[S]) -> S:
    """Returns the server's source of this class. StopIteration without one."""
    return next(source for source in server.sources if isinstance(source, kind))


@contextlib.contextmanager
def broker_below(
    kernel: PlayedKernel | None,
    folder: Path,
    keys: Kernel | None = None,
    services: Mapping[str, Service] = SERVICES,
    start: Sequence[str] = COMMAND,
    read: Callable[[], Configured] | None = None,
    line_of: Callable[[int], Line] = strangers,
    owners: Mapping[str, int] | None = None,
) -> Iterator[Server]:
    """Runs a broker in a thread of this process. It serves `folder`; its log is the file broker.log beside it.

    `kernel`: simulates /dev/ecryptfs. `keys`: simulates the queries of request_key. `line_of`: returns the ancestry of
    a pid; by default none, so that a test's process can be daemon and requester at once. NotInTime if it does not end.
    """
    place: Place = own_place(folder)
    with (folder.parent / "broker.log").open("ab") as log:
        logs = EventLog("upcall-broker", log.fileno())
        make = sources(place, None if kernel is None else kernel.open, keys, owners or {})
        server = Server(place, make, services, logs, start, read, people=People(logs, line_of=line_of))
        thread = threading.Thread(target=server.run, name="broker")
        thread.start()
        try:
            yield server
        finally:
            server.stop()
            thread.join(PATIENCE)
            if thread.is_alive():
                raise NotInTime("the broker has not ended")

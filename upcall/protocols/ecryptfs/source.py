"""Reads the kernel's eCryptfs requests, one open /dev/ecryptfs per registered uid, and writes the answers.

The kernel breaks if its requests are not read in time (docs/architecture.md), so each is read at once, before it is
routed. The kernel does not validate answers, so only checked answers and failure packets are written.
"""

from __future__ import annotations

import errno
import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Protocol

from upcall.core.errors import PeerError, error_words
from upcall.core.messages import Answer, Refusal, Requester
from upcall.core.router import Router
from upcall.kernel.process import schedule_as_batch
from upcall.process.log import EventLog
from upcall.process.loop import URGENT, Loop
from upcall.process.source import Source
from upcall.protocols.ecryptfs.packets import REQUEST, Frame, check_ask, pack_failure, pack_response_frame, take_frame
from upcall.wire.envelope import refusal

_SERVICE = "ecryptfs"
_RETRY = 2.0  # seconds until a device that could not be opened is tried again
_HEARTBEAT = 0.25  # seconds between turns of the loop: bounds the unknown age of a request
_LAST_READS = 64  # frames that are read when closing: twice the kernel's contexts


class Device(Protocol):
    """An open /dev/ecryptfs of one uid: upcall.protocols.ecryptfs.device.Miscdev. `fd` is -1 once it is closed."""

    uid: int
    fd: int

    def fileno(self) -> int: ...
    def readable(self) -> bool: ...
    def read(self) -> bytes: ...
    def write(self, frame: bytes, /) -> None: ...
    def close(self) -> None: ...


OpenDevice = Callable[[int], Device]  # opens the device with this euid; OSError


class _FromKernel:
    """The origin of a request from the kernel: writes its outcome to the device as a frame."""

    __slots__ = ("_asked", "_device", "_devices", "_index", "_seq", "wants_why")

    def __init__(self, devices: Devices, device: Device, seq: int, index: int, asked: bytes) -> None:
        self._devices, self._device = devices, device
        self._seq, self._index, self._asked = seq, index, asked
        self.wants_why = False

    def settle(self, outcome: Answer | Refusal) -> None:
        packet = outcome.body if isinstance(outcome, Answer) else pack_failure(self._asked)
        self._devices.write(self._device, self._seq, self._index, packet)


class Devices(Source):
    """The devices of all registered uids. If one cannot be opened, it is logged, and retried every 2 seconds while its
    daemon is registered."""

    name = "ecryptfs"

    def __init__(self, loop: Loop, router: Router, log: EventLog, open_device: OpenDevice) -> None:
        super().__init__(loop, router, log)
        router.on_registered.append(self.open)
        router.on_gone.append(self.close_of)
        self._open_device = open_device
        self._open: dict[int, Device] = {}
        self._wanted: dict[int, float] = {}  # uid -> when to try again
        self._failed: dict[int, str] = {}
        self.counts: Counter[str] = Counter()
        self._retrying = loop.timer(self._retry)
        self._heartbeat = loop.timer(self._beat)

    def open(self, uid: int) -> None:
        """Opens the device with euid `uid`, unless it is open; schedules a retry if that fails."""
        if uid in self._open:
            return
        try:
            device = self._open_device(uid)
        except OSError as error:
            why = "another daemon of this uid has it" if error.errno == errno.EINVAL else error_words(error)
            if self._failed.get(uid) != why:
                self.log("device-open-failed", uid=uid, why=why)
            self._failed[uid] = why
            self._wanted[uid] = self.loop.now + _RETRY
            self._retrying.at(self._wanted[uid])
            return
        self._failed.pop(uid, None)
        self._wanted.pop(uid, None)
        self._open[uid] = device
        schedule_as_batch()
        self.loop.add(device, partial(self._on_readable, device, Requester(uid, 0)), URGENT)
        self.log("device-opened", uid=uid)
        self._heartbeat.at(self.loop.now + _HEARTBEAT)

    def _retry(self, now: float) -> None:
        for uid in [uid for uid, when in self._wanted.items() if when <= now]:
            self.open(uid)
        self._retrying.at(min(self._wanted.values(), default=math.inf))

    def _beat(self, now: float) -> None:
        if self._open:
            self._heartbeat.at(now + _HEARTBEAT)

    def close_of(self, uid: int) -> None:
        """Reads and refuses the pending requests, then closes the device. The requester of an unread one would wait
        for the kernel's time-out of 3 s."""
        self._wanted.pop(uid, None)
        self._failed.pop(uid, None)
        device = self._open.pop(uid, None)
        if device is None:
            return
        self.loop.remove(device)
        for _ in range(_LAST_READS):
            if not device.readable():
                break
            frame = self._read(device)
            if frame is not None and frame.data is not None and frame.index is not None:
                self.write(device, frame.seq, frame.index, pack_failure(frame.data))
                self.counts["refused at closing"] += 1
        device.close()
        self.log("device-closed", uid=uid)

    def close(self) -> None:
        for uid in tuple(self._open):
            self.close_of(uid)

    def write(self, device: Device, seq: int, index: int, packet: bytes) -> None:
        """Writes an answer. If its requester has gone (EINVAL) it is counted and logged."""
        if device.fd < 0:
            return
        try:
            device.write(pack_response_frame(seq, index, packet))
        except OSError as error:
            self.counts["not taken"] += 1
            self.log("device-write-failed", uid=device.uid, seq=seq, index=index, why=error)

    def _on_readable(self, device: Device, requester: Requester) -> None:
        frame = self._read(device)
        if frame is None:
            return
        if frame.data is None or frame.index is None:
            self.counts["stale"] += 1  # the kernel's time-out has passed: must not be answered
            return
        origin = _FromKernel(self, device, frame.seq, frame.index, frame.data)
        try:
            check_ask(frame.data)
        except PeerError as error:
            self.log("request-rejected", uid=device.uid, why=error)
            origin.settle(refusal("bad-request"))
            return
        self.router.ask(device.uid, _SERVICE, requester, frame.data, origin, self.loop.since)

    def _read(self, device: Device) -> Frame | None:
        try:
            data = device.read()
        except OSError as error:
            self.log("device-read-failed", uid=device.uid, why=error)
            return None
        if not data:
            return None
        self.counts["read"] += 1
        try:
            frame = take_frame(data)
        except PeerError as error:
            self.counts["nonsense"] += 1
            self.log("frame-rejected", uid=device.uid, why=error)
            return None
        return frame if frame.type == REQUEST else None

    def status(self, uid: int | None) -> dict[str, object]:
        found: list[dict[str, object]] = [
            {"uid": one, "open": True} for one in self._open if uid is None or one == uid
        ]
        found += [
            {"uid": one, "open": False, "why": why} for one, why in self._failed.items() if uid is None or one == uid
        ]
        return {"devices": found} | ({"kernel": dict(self.counts)} if uid is None else {})

"""Runs the daemon: registers with the broker, receives requests, passes them to handlers, sends the answers.

Threads: see the package's docstring.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import select
import signal
import struct
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from upcall.core.errors import ModuleFailed, PeerError, Refused, UpcallError, UsageError, error_words
from upcall.core.messages import Refusal
from upcall.daemon.broker_link import BrokerLink
from upcall.daemon.control import Control
from upcall.daemon.workers import Workers
from upcall.handler import Handler, Named, Notified, SelfWaiting, Varied, Waits
from upcall.kernel.netlink import Packet
from upcall.kernel.notify import Manager
from upcall.process.log import EventLog
from upcall.process.paths import Place
from upcall.process.reload import Hangup
from upcall.process.waker import Waker
from upcall.wire.envelope import (
    HEADER,
    HELO,
    MAX_WHY,
    NOTICE,
    QUIT,
    REQUEST,
    Envelope,
    pack_answer,
    pack_control,
    pack_response,
    refusal,
    response_position,
    take_request,
)

if TYPE_CHECKING:
    from upcall.observe.recorder import Recorder

_RETRY_FIRST, _RETRY_MOST = 0.05, 1.0  # seconds between attempts to register: exponential back-off
_KEY_OF = {"too-many-daemons": " ([broker] daemons-per-person or daemons)"}  # reason -> settings that limit it
_HELLO_PATIENCE = 1.0  # seconds, the time-out of a broker's answer to HELO
_WAKE_TRIES = 100
_REQUEST_TYPE = struct.pack("=H", REQUEST)  # nlmsg_type, after nlmsg_len
_LASTING = frozenset({"locked", "prompting", "pin-refused"})  # reasons that every request has until a person acts
# Seconds until the daemon ends after its QUIT: slightly more than the longest patience; less if no request is left.
_QUIT_PATIENCE, _QUIT_PATIENCE_IDLE = 10.5, 2.0


class _Route:
    """What the daemon must know of the handler of a service. Found out once: isinstance with a protocol takes longer
    than most of a request."""

    __slots__ = ("handler", "kind", "waits")

    def __init__(self, handler: Handler, waits: Waits | None) -> None:
        self.handler, self.waits = handler, waits
        self.kind = handler.kind if isinstance(handler, Varied) else None


# Plain tuples: they are made for each request.
_Job = tuple[Envelope, _Route, BrokerLink, bool]  # the last: whether it is a notice, which must not be answered
_Work = tuple[_Job, str, str | int, float, float]  # as Workers' `receive` returns it


class Daemon:
    """The daemon of one user. `run` blocks in the main thread; workers call the handlers."""

    def __init__(
        self,
        place: Place,
        handlers: Sequence[Handler],
        control: Control | None = None,
        log: EventLog | None = None,
        manager: Manager | None = None,
        record: Recorder | None = None,
        find: Callable[[], Place] | None = None,
    ) -> None:
        """`handlers`: each answers its `services`; a later one replaces an earlier one. `record`: is called for each
        request. `find`: looks for the broker again, until the first registration; without it, that is `place`.
        Registers nothing yet."""
        self._record = record
        self.log = log or EventLog("upcall-daemon")
        self._uid = os.getuid()
        self.place, self._control, self._manager = place, control, manager or Manager({})
        self._find = find
        self.on_reload: Callable[[], None] = lambda: None  # called in the main thread; must not block
        self._link: BrokerLink | None = None
        self._change = threading.Condition()  # of the link
        self._stopping = self._over = self._reloading = False
        self._waker = Waker()
        self._waits = {service: one for one in self._waits_of(handlers) for service in one.services}
        self._routes = self._routes_to(handlers)
        self._workers: Workers[_Job] = Workers(self._receive, self._work, self._refuse, look=self._look)
        self.strangers = 0  # messages from unexpected senders
        self.tracebacks = False  # whether those of plugins' exceptions are printed on standard error
        self.last_refusal: dict[str, object] = {}  # `at` in seconds since the epoch; for the status
        if control is not None:
            control.last_refusal = lambda: self.last_refusal
        self.replaced = False  # the broker has reported that a newer daemon of this user has registered

    # --- the main thread -----------------------------------------------------------------------------------

    def run(self) -> None:
        """Serves until SIGTERM (see `stop`) or until a newer daemon of this user takes over."""
        self._workers.start()
        while not self._stopping and not self._over:
            self._register()
            if self._link is not None:
                self._watch(self._link)
        self._manager.stopping()
        self._say_goodbye()
        self.log.flush()
        if self._record is not None:
            self._record.flush()

    def stop(self, *_: object) -> None:
        """Ends `run` after the pending requests have been answered; at once if called again. From a signal handler or
        any thread."""
        if self._stopping:
            self._over = True
        self._stopping = True
        self._waker.wake()

    def reload(self, *_: object) -> None:
        """Schedules a call of `on_reload` in the main thread. From a signal handler or any thread."""
        self._reloading = True
        self._waker.wake()

    def heed_signals(self) -> None:
        """Installs `stop` as the handler of SIGTERM and SIGINT. In the main thread only."""
        self._waker.heed_signals(self.stop)

    def use(self, gone: Collection[str], new: Sequence[Handler]) -> None:
        """Removes the services in `gone` and adds those of `new`, from the next request on. From any thread."""
        routes = {service: route for service, route in self._routes.items() if service not in gone}
        self._routes = routes | self._routes_to(new)

    def _routes_to(self, handlers: Sequence[Handler]) -> dict[str, _Route]:
        return {
            service: _Route(handler, self._waits.get(service)) for handler in handlers for service in handler.services
        }

    def _register(self) -> None:
        """Registers with a broker; retries with back-off until that succeeds or the daemon is stopped."""
        pause, told = _RETRY_FIRST, ""
        while not (self._stopping or self._over or self._link):
            why = self._failed_to_register()
            if why is None:
                return
            if why != told:
                told = why
                self.log("broker-unavailable", folder=self.place.folder, why=why)
                self._manager.status(f"no broker: {why}")
            self._pause(pause)
            pause = min(_RETRY_MOST, pause * 2)

    def _failed_to_register(self) -> str | None:
        """Tries once. Returns the reason if it fails; then nothing of the link is kept."""
        try:
            if self._find is not None:  # a broker of this user's own may have been started after the daemon
                self.place = self._find()
            link = BrokerLink(self.place)
            link.take(_HELLO_PATIENCE)
            control = self._control
            with contextlib.nullcontext() if control is None else control.registering(_HELLO_PATIENCE):
                if not link.greet(_HELLO_PATIENCE):
                    return "it does not answer HELO"
                if control is not None:
                    control.take()  # not before: commands must reach the daemon that serves requests
        except Refused as error:
            return f"it refuses: {error.reason}{_KEY_OF.get(error.reason, '')}"
        except (OSError, UsageError) as error:
            return error_words(error)
        self._find = None  # the daemon stays with this broker, also when it is restarted
        with self._change:
            self._link = link
            self._change.notify_all()
        return None

    def _watch(self, link: BrokerLink) -> None:
        """Serves until the broker or the daemon ends, or a newer daemon replaces this one."""
        self.log("daemon-registered", broker=link.broker_pid)
        self._manager.ready(f"registered with the broker {link.broker_pid}")
        while not self._stopping and not self._over:
            if self._pause(None, link):
                told = link.told()
                if told == "quit":
                    self.log("daemon-replaced", why="a newer daemon of this user has registered")
                    self._over = self.replaced = True
                elif told == "gone":
                    self.log("broker-gone", broker=link.broker_pid)
                    self._manager.status("the broker has gone, waiting for the next")
                    break
        if not self._stopping and not self._over:
            with self._change:
                self._link = None
            self._leave(link)

    def _leave(self, link: BrokerLink) -> None:
        """Wakes the workers that wait at the link of a broker that has ended: see BrokerLink, and `_receive`."""
        for _ in range(_WAKE_TRIES):
            if link.wake():
                return
            self._pause(_RETRY_FIRST)  # the queue is full: workers read it, and notice the end of the link

    def _pause(self, timeout: float | None, link: BrokerLink | None = None) -> bool:
        """Waits for `timeout` seconds (None: no limit), a wake-up, or a command, which it serves. True if the broker
        has sent something on the connection, or closed it. Returns in time to notify the watchdog."""
        now = time.monotonic()
        self._manager.alive(now, self._progress)
        wait = min(math.inf if timeout is None else timeout, self._manager.next_wake() - now)
        poll = select.poll()
        poll.register(self._waker, select.POLLIN)
        if link is not None:
            poll.register(link.connection, select.POLLIN)
        if self._control is not None:
            poll.register(self._control.listener, select.POLLIN)
        said = False
        for fd, _ in poll.poll(None if wait == math.inf else max(0.0, wait) * 1000):
            if link is not None and fd == link.connection.fileno():
                said = True
            elif fd == self._waker.fileno():
                self._waker.heard()
                if self._reloading:
                    self._reloading = False
                    self.on_reload()
            elif self._control is not None:
                self._control.serve_one()
        return said

    def _progress(self) -> bool:
        """Returns whether the daemon can serve requests, for the watchdog. A key module that hangs occupies only the
        workers of its lane. If all workers are overdue and messages wait, only a restart of the process helps."""
        if not self._workers.stuck(time.monotonic()):
            return True
        link = self._link
        if link is None or not link.waiting():
            return True
        self.log("workers-stuck", workers=self._workers.threads, why="all of them hang, and requests are waiting")
        return False

    def _say_goodbye(self) -> None:
        """Sends QUIT and waits until the broker has all answers and replies with QUIT, or a time-out."""
        link = self._link
        if link is None or self._over:
            return
        try:
            link.send(pack_control(QUIT))
        except OSError:
            return
        said = time.monotonic()
        while not self._over:
            patience = _QUIT_PATIENCE if self._workers.running else _QUIT_PATIENCE_IDLE
            if time.monotonic() - said > patience:
                self.log("quit-unanswered", running=self._workers.running)
                return
            if self._pause(0.1, link) and link.told():
                return

    # --- the workers ---------------------------------------------------------------------------------------

    def _receive(self) -> _Work | None:
        """Blocks until a message arrives. None if no handler must be called for it."""
        link = self._link
        if link is None:
            with self._change:
                self._change.wait_for(lambda: self._link is not None)
            return None
        try:
            packet = link.receive()
        except (OSError, MemoryError) as error:
            self.log("receive-failed", why=error)
            return None
        if packet is None:
            return None
        data = packet.data
        if link is self._link and data[4:6] == _REQUEST_TYPE and packet[1:] == link.sender:
            return self._job(data, link)
        return self._other(packet, link)

    def _other(self, packet: Packet, link: BrokerLink) -> _Work | None:
        """Handles what is not a request of the present broker."""
        data = packet.data
        kind = HEADER.unpack_from(data)[1] if len(data) >= HEADER.size else 0
        if link is not self._link:
            # The broker has ended, and its requests with it. Wake the next worker that waits at this link, too.
            link.wake()
            if kind == REQUEST:
                return None
        if packet[1:] != link.sender:
            self._stranger(packet)
        elif kind == REQUEST:
            return self._job(data, link)
        elif kind == NOTICE:
            return self._notice(data, link)
        elif kind not in (HELO, QUIT):  # QUIT concerns the main thread, which reads it from the connection
            self.log("message-unknown", type=kind)
        return None

    def _stranger(self, packet: Packet) -> None:
        """Counts and logs an unexpected sender. Only a process with a copy of the link's sockets can be one, inherited
        or passed from the daemon or the broker."""
        if packet.pid != os.getpid():  # otherwise it is BrokerLink.wake
            self.strangers += 1
            self.log("unexpected-sender", uid=packet.uid, pid=packet.pid)

    def _job(self, data: bytes, link: BrokerLink) -> _Work | None:
        """Makes a job of a request; refuses it if that fails. It is answered exactly once as soon as its envelope is
        known, even if the rest is malformed."""
        try:
            envelope = take_request(data)
        except PeerError as error:
            self.log("request-rejected", why=error)
            self._refuse_position(data, link)
            return None
        route = self._routes.get(envelope.service)
        try:
            if route is None:
                raise Refused("no-service")
            lane = route.handler.lane(envelope)
            kind = 0 if route.kind is None else route.kind(envelope)
            if not isinstance(lane, str) or not isinstance(kind, (int, str)):
                raise TypeError  # the workers must be able to look them up
        except BaseException as error:  # noqa: BLE001 - a handler may raise anything; the worker must go on
            self._send(link, envelope, self._refusal(envelope, error))
            return None
        deadline, now = envelope.deadline_ns / 1e9 or math.inf, time.monotonic()
        if deadline <= now:
            return None  # its deadline passed in the socket's queue: the broker has refused it
        job = envelope, route, link, False
        if route.waits is not None and not route.waits.hold(envelope.seq, deadline, lane, job):
            self._refuse_own(job, "the worker of a refused request is still busy")
            return None
        return job, lane, kind, deadline, now

    def _notice(self, data: bytes, link: BrokerLink) -> _Work | None:
        try:
            envelope = take_request(data)
        except PeerError as error:
            self.log("notice-rejected", why=error)
            return None
        route = self._routes.get(envelope.service)
        if route is None:
            self.log("notice-unhandled", service=envelope.service, why="no handler is installed and allowed")
            return None
        return (envelope, route, link, True), f"notices {envelope.service}", 0, math.inf, time.monotonic()

    def _tell(self, envelope: Envelope, handler: Handler) -> None:
        try:
            if not isinstance(handler, Notified):
                raise ModuleFailed("the handler takes no notices")
            handler.notice(envelope)
        except BaseException as error:  # noqa: BLE001 - a handler may raise anything; the worker must go on
            self._refusal(envelope, error)

    def _work(self, job: _Job) -> None:
        envelope, route, link, notice = job
        if notice:
            return self._tell(envelope, route.handler)
        begun = 0.0 if self._record is None else time.monotonic()
        outcome: bytes | Refusal
        try:
            outcome = route.handler.answer(envelope)
            if not isinstance(outcome, bytes):
                raise TypeError
        except BaseException as error:  # noqa: BLE001 - any exception of a module becomes a refusal
            outcome = self._refusal(envelope, error)
        if route.waits is not None and not route.waits.let_go(envelope.seq):
            return None  # it was refused meanwhile
        return self._send(link, envelope, outcome, begun)

    def _waits_of(self, handlers: Sequence[Handler]) -> Iterator[Waits]:
        for handler in handlers:
            if isinstance(handler, SelfWaiting):
                handler.waits.refuse = self._refuse_own
                yield handler.waits

    def _look(self) -> None:
        for waits in self._waits.values():
            waits.look()

    def _refuse_own(self, job: _Job, by: str) -> None:
        envelope, _, link, _ = job
        self.log("deadlock-refused", service=envelope.service, seq=envelope.seq, waiting=by)
        self._send(link, envelope, refusal("own-request"))

    def _refusal(self, envelope: Envelope, error: BaseException) -> Refusal:
        """Translates a handler's exception to a refusal and logs it. The texts of unexpected exceptions are not
        logged: they may contain secrets."""
        if self.tracebacks and (error.__cause__ is not None or not isinstance(error, UpcallError)):
            traceback.print_exception(error)
        if isinstance(error, Refused):
            if error.why and error.reason not in _LASTING:
                self.log(
                    "request-refused", service=envelope.service, seq=envelope.seq, reason=error.reason, why=error.why
                )
            return self._told(envelope, Refusal(error.reason, error.errno, error.why))
        if isinstance(error, PeerError):
            self.log("request-rejected", service=envelope.service, why=error)
            return self._told(envelope, refusal("bad-request", why=str(error)))
        if isinstance(error, ModuleFailed):
            self.log("module-failed", service=envelope.service, seq=envelope.seq, why=error)
            return self._told(envelope, refusal("module-failed", why=str(error)))
        name, at = type(error).__name__, _where(error)
        self.log("module-broke", seq=envelope.seq, error=name, at=at)
        return self._told(envelope, refusal("module-broke", why=f"{name} at {at}"))

    def _told(self, envelope: Envelope, refused: Refusal) -> Refusal:
        """Returns a refusal without its `why`, unless it goes to a process of this user that wants it."""
        why = refused.why[:MAX_WHY]
        self.last_refusal = {
            "at": time.time(), "service": envelope.service, "reason": refused.reason, "why": why,
        }  # fmt: skip
        if envelope.wants_why and envelope.requester.uid == self._uid:
            return refused
        return refused._replace(why="")

    def _refuse(self, job: _Job, refused: Refused) -> None:
        envelope, route, link, notice = job
        if notice:
            self.log("notice-dropped", service=envelope.service, why=refused.reason)
        elif route.waits is None or route.waits.let_go(envelope.seq):
            self._send(link, envelope, Refusal(refused.reason, refused.errno))

    def _refuse_position(self, data: bytes, link: BrokerLink) -> None:
        try:
            seq, index = response_position(data)
        except PeerError:
            return
        self._send_bytes(link, pack_response(seq, index, refusal("bad-request")))

    def _send(self, link: BrokerLink, envelope: Envelope, outcome: bytes | Refusal, begun: float = 0.0) -> None:
        """Sends an answer's body, or a refusal."""
        seq, index = envelope.seq, envelope.index
        try:
            data = (
                pack_answer(seq, index, outcome) if isinstance(outcome, bytes) else pack_response(seq, index, outcome)
            )
        except PeerError as error:
            self.log("module-broke", seq=seq, why=error)
            outcome = refusal("module-broke")
            data = pack_response(seq, index, outcome)
        if self._record is None:
            return self._send_bytes(link, data)
        seconds = time.monotonic() - begun if begun else 0.0
        self._send_bytes(link, data)
        return self._tell_of(self._record, envelope, outcome, seconds)

    def _tell_of(self, record: Recorder, envelope: Envelope, outcome: bytes | Refusal, seconds: float) -> None:
        """Records a request. `seconds`: time in the handler; 0 if it was refused before."""
        route = self._routes.get(envelope.service)
        name = outcome.reason if isinstance(outcome, Refusal) else "answered"
        by = route.handler.answered_by(envelope) if route and isinstance(route.handler, Named) else ""
        record(self._uid, envelope.service, name, seconds, envelope.seq, by)

    def _send_bytes(self, link: BrokerLink, data: bytes) -> None:
        """Sends an answer to the broker that asked, never to its successor."""
        if self._link is not link:
            return
        try:
            if not link.send(data):
                self.log("answer-send-failed", why="the broker reads nothing")
        except OSError as error:
            self.log("answer-send-failed", why=error)


def _where(error: BaseException) -> str:
    """Returns file and line of an exception; its message may contain secrets and is not logged."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "?"


def serve(daemon: Daemon, hangup: Hangup | None = None) -> None:
    """Runs a daemon in this process until SIGTERM or SIGINT. `hangup`: makes SIGHUP reload."""
    daemon.heed_signals()
    if hangup is not None:
        hangup.connect(daemon.reload, daemon.stop)
    gc.freeze()
    daemon.run()
    signal.set_wakeup_fd(-1)

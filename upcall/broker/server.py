"""The broker's process: registration, the daemons, and the loop around them.

Threads: one runs everything; one writes the log; opening /dev/ecryptfs for a uid borrows a third for a moment.
Ownership: every descriptor belongs to one object here, which takes it out of the loop before closing it.
"""

from __future__ import annotations

import functools
import gc
import math
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from upcall import __version__, config
from upcall.broker.launcher import COMMAND, Starter
from upcall.broker.loop import URGENT, Loop
from upcall.broker.people import Persons
from upcall.broker.registration import Registration
from upcall.broker.settings import Configured, configured
from upcall.broker.source_listener import SourceListener
from upcall.core.contexts import Line
from upcall.core.errors import UpcallError
from upcall.core.registry import Association
from upcall.core.router import Broker
from upcall.core.service import NOTICES, SERVICES, Service, with_contexts
from upcall.kernel import ancestry, requestkey
from upcall.kernel.notify import Manager
from upcall.kernel.process import harden, prefer_us, raise_descriptor_limit, stay_in_memory
from upcall.process.hardening import Hardening, hands_on, of_broker
from upcall.process.log import EventLog
from upcall.process.paths import Place, own_place
from upcall.process.reload import Hangup, Reloading
from upcall.process.waker import Waker
from upcall.protocols.ecryptfs.device import Miscdev
from upcall.protocols.ecryptfs.source import Devices, OpenDevice
from upcall.protocols.local.source import Requesters
from upcall.protocols.request_key.source import Forwarders, Kernel

if TYPE_CHECKING:
    from upcall.observe.recorder import Recorder


class Server:
    """Everything that `upcall broker` is."""

    def __init__(
        self,
        place: Place,
        services: Mapping[str, Service] = SERVICES,
        log: EventLog | None = None,
        device: OpenDevice | None = None,
        keys: Kernel | None = None,
        owners: Mapping[str, int] | None = None,
        start: Sequence[str] = COMMAND,
        read: Callable[[], Configured] | None = None,
        manager: Manager | None = None,
        line_of: Callable[[int], Line] | None = None,
        persons: Persons | None = None,
        machine: int = 0,
    ) -> None:
        """`device` opens /dev/ecryptfs for a uid, `keys` tells of keys that the kernel wants; None where there is no
        right to it. `owners`: by type, whose daemon answers for keys that do not say it. `start`: the command that
        starts a daemon. `read`: reads the configuration again, in another thread. `manager`: who is told how we are.
        `line_of`: from whom a process descends, if not as the kernel says. `machine`: the uid of the machine's daemon.
        OSError, UsageError."""
        self.place = place
        self.manager = manager or Manager({})
        self.log = log or EventLog("upcall-broker")
        self.line_of = line_of or ancestry.line_of
        self.persons = persons or Persons(self.log)
        self.person_of = self.log.person_of = self.persons.of
        self.loop = Loop()
        self.starter = Starter(self, start)
        self.broker = Broker(services, self.log, self.starter.start, machine)
        self.broker.person_of = self.person_of
        self.junk: Counter[str] = Counter()
        # Seconds, monotonic. The clock is read once a turn; nothing that is read in this turn can have been there
        # before `since`, the turn before.
        self.now = self.since = time.monotonic()
        self._stopping = self._rereading = False
        self.hardening: Hardening | None = None
        self._hands_on = True  # what a command starts that is not a service manager's is not restricted with us
        self._read, self._found = read, deque[Configured]()
        self._reloading = Reloading(self._read_again)
        self.requesters = Requesters(self, place.socket)
        self.devices = Devices(self, device) if device is not None else None
        self.forwarders = (
            Forwarders(self, place.request_key_socket, keys, owners or {}, os.geteuid()) if keys is not None else None
        )
        self.registration = Registration(self, place.registration_socket)
        self.sources = SourceListener(self, place.source_socket)
        self._waker = Waker()
        self.loop.add(self._waker, self._on_signal, URGENT)
        self._watchdog = self.loop.timer(self._alive)
        self._watchdog.at(self.manager.next_wake())

    # --- daemons -------------------------------------------------------------------------------------------

    def after_helo(self, association: Association) -> None:
        """A daemon has registered: the kernel's requests for its uid are served."""
        if self.devices is not None and self.broker.registry.get(association.uid) is association:
            self.devices.open(association.uid)

    def reject(self, on: str, uid: int, pid: int) -> None:
        """Counts what nobody may say."""
        self.junk[on] += 1
        self.log("message-rejected", on=on, uid=uid, pid=pid)

    def after_close(self, uid: int) -> None:
        """A link was closed: without a daemon, a uid's device is of no use."""
        if self.devices is not None and self.broker.registry.get(uid) is None:
            self.devices.close(uid)

    # --- running -------------------------------------------------------------------------------------------

    def stop(self, *_: object) -> None:
        """Ends `run` soon; from a signal handler or another thread."""
        self._stopping = True
        self._waker.wake()

    def reload(self, *_: object) -> None:
        """Has the configuration read again, soon; from a signal handler or another thread."""
        self._rereading = True
        self._waker.wake()

    def heed_signals(self) -> None:
        """SIGTERM and SIGINT end `run`. In the main thread."""
        self._waker.heed_signals(self.stop)

    def _on_signal(self) -> None:
        self._waker.heard()
        if self._rereading:
            self._rereading = False
            self.manager.reloading()
            self._reloading.ask()
            self.persons.reread()
        while self._found:
            self._follow(self._found.popleft())

    def _read_again(self) -> None:
        """In a thread of its own: files and directories of users may be slow."""
        if self._read is None:
            return
        try:
            self._found.append(self._read())
        except (UpcallError, OSError) as error:
            self.log("not-reloaded", why=error)
            self.manager.ready(f"serving as before, configuration not reloaded: {error}")
        self._waker.wake()

    def harden(self, hardening: Hardening, may_hand_on: bool) -> None:
        """Says what this process has given up. `may_hand_on`: whether daemons could live with as little."""
        self.hardening, self._hands_on = hardening, may_hand_on
        self.log("hardened", **hardening._asdict())

    def _follow(self, found: Configured) -> None:
        """Does what the configuration says from the next request on; what is owed is owed as before."""
        before, self.broker.machine = self.broker.machine, found.machine
        self.broker.services, self.broker.limits = found.services, found.limits
        if before != found.machine:
            self.sources.machine_changed()
        if found.command is not None and hands_on(found.command) and not self._hands_on:
            self.log("start-not-followed", why="daemons would inherit what this broker has given up: start it anew")
        else:
            self.starter.use(found.start)
        if self.forwarders is not None:
            self.forwarders.owners = found.owners
        self.log("reloaded")
        self.manager.ready(f"serving {self.place.folder}, configuration reloaded")

    def run(self) -> None:
        """Serves until `stop`, then refuses what is owed and closes."""
        self.log("ready", folder=self.place.folder)
        self.manager.ready(f"serving {self.place.folder}")
        try:
            while not self._stopping:
                wake = min(self.broker.next_wake(), self.loop.wake)
                ready = self.loop.wait(-1 if wake == math.inf else max(0.0, wake - self.now))
                self.since, self.now = self.now, time.monotonic()
                self.broker.now = self.now
                self.loop.run(ready, self.now)
                if self.now >= wake:
                    self.broker.expire(self.now)
                    self.loop.fire(self.now)
        finally:
            self._close()

    def _alive(self, now: float) -> None:
        """The loop turns."""
        self.manager.alive(now)
        self._watchdog.at(self.manager.next_wake())

    def _close(self) -> None:
        self.manager.stopping()
        self.broker.close()
        if self.devices is not None:
            self.devices.close_all()
        self.starter.close()
        self.requesters.close()
        if self.forwarders is not None:
            self.forwarders.close()
        self.sources.close()
        for association in self.broker.registry:
            association.link.close()
        self.registration.close()
        self.loop.remove(self._waker)
        self._waker.close()
        self.loop.close()
        self.log("closed")
        self.log.flush()

    def status(self, uid: int | None) -> dict[str, object]:
        """For `upcall status`: of one uid, or of all."""
        found = self.broker.status(self.now, uid)
        found["broker"] = {
            "pid": os.getpid(),
            "uid": os.geteuid(),
            "machine": self.broker.machine,
            "version": __version__,
            "ecryptfs": self.devices is not None,
            "hardening": {} if self.hardening is None else self.hardening._asdict(),
        }
        if uid is None:
            found["junk"] = dict(self.junk)
            found["kernel"] = {} if self.devices is None else dict(self.devices.counts)
            found["request_key"] = {} if self.forwarders is None else dict(self.forwarders.counts)
            said = self.sources.status()
            found.update({name: said.get(name, {}) for name in NOTICES})
        found["devices"] = [] if self.devices is None else self.devices.status(uid)
        return found


def main(
    folder: Path | None = None,
    device: Path | None = None,
    contexts: int | None = None,
    records: str | None = None,
) -> None:
    """Runs a broker in this process until SIGTERM or SIGINT. OSError, UsageError, ConfigError before it is ready.

    SIGHUP has the configuration read again. `records`: where a record of each request goes
    (upcall/observe/recorder.py); None: as the configuration says.
    """
    hangup = Hangup()
    harden()
    raise_descriptor_limit()
    prefer_us()
    open_device = None
    if device is not None:
        open_device = functools.partial(Miscdev, path=device)
        stay_in_memory()  # a page that comes back from a slow disk can take longer than the kernel's 3 s
    read = functools.partial(configured, SERVICES if contexts is None else with_contexts(contexts))
    found = read()
    keys = requestkey if os.geteuid() == 0 else None
    place = own_place(folder)
    where = _where(records)
    hardened = of_broker(place.folder, found.hardening, where, device, found.command)
    manager = Manager()
    server = Server(
        place, found.services, None, open_device, keys, found.owners, found.start, read, manager,
        machine=found.machine,
    )  # fmt: skip
    server.harden(hardened, not found.hardening or (found.command is not None and hands_on(found.command)))
    server.broker.limits = found.limits
    server.heed_signals()
    record = _recorder(where, server)
    hangup.connect(server.reload, server.stop)
    gc.freeze()
    server.run()
    if record is not None:
        record.flush()


def _where(told: str | None) -> str:
    """Where records go; "no": nowhere."""
    if told is None and not config.settings("log").get("requests", False):
        return "no"
    from upcall.observe.recorder import wanted  # only who wants records pays for it

    return wanted(told, user=False)


def _recorder(where: str, server: Server) -> Recorder | None:
    if where == "no":
        return None
    from upcall.observe.recorder import recorder

    record = recorder("upcall-broker", where, server.log)
    server.broker.record = record
    return record

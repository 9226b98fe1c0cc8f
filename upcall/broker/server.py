"""The broker's process: a loop, a router, registration, and a list of sources.

Threads: one runs everything; one writes the log; reading the configuration, and opening /dev/ecryptfs for a uid,
borrow others for a moment.
Ownership: every descriptor belongs to one object here, which takes it out of the loop before closing it.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from upcall import __version__, config
from upcall.broker.launcher import COMMAND, Launcher
from upcall.broker.registration import Registration
from upcall.broker.settings import Configured, configured
from upcall.core.errors import UpcallError
from upcall.core.router import Router
from upcall.core.service import Service, with_contexts
from upcall.kernel.notify import Manager
from upcall.kernel.process import harden, prefer_us, raise_descriptor_limit, stay_in_memory
from upcall.process.hardening import Hardening, hands_on, of_broker
from upcall.process.log import EventLog
from upcall.process.loop import URGENT, Loop
from upcall.process.paths import Place, own_place
from upcall.process.people import People
from upcall.process.reload import Hangup, Reloading
from upcall.process.source import MakeSource, Source
from upcall.process.waker import Waker
from upcall.protocols.catalogue import PROTOCOLS, SERVICES
from upcall.protocols.local.source import Requesters
from upcall.protocols.protocol import Given

if TYPE_CHECKING:
    from upcall.observe.recorder import Recorder


class Server:
    """Everything that `upcall broker` is."""

    def __init__(
        self,
        place: Place,
        make: Iterable[MakeSource] = (),
        services: Mapping[str, Service] = SERVICES,
        log: EventLog | None = None,
        start: Sequence[str] = COMMAND,
        read: Callable[[], Configured] | None = None,
        manager: Manager | None = None,
        people: People | None = None,
        machine: int = 0,
    ) -> None:
        """`make`: the sources, beside that of requesters in user space. `start`: the command that starts a daemon.
        `read`: reads the configuration again, in another thread. `manager`: who is told how we are. `machine`: the uid
        of the machine's daemon. OSError, UsageError."""
        self.place = place
        self.manager = manager or Manager({})
        self.log = log or EventLog("upcall-broker")
        self.people = people or People(self.log)
        self.log.person_of = self.people.of
        self.loop = Loop()
        self.launcher = Launcher(self.loop, self.log, lambda uid: self.router.given_up(uid), start)
        self.router = Router(services, self.log, self.launcher.start, machine)
        self.router.person_of = self.people.of
        self._stopping = self._rereading = False
        self.hardening: Hardening | None = None
        self._hands_on = True  # what a command starts that is not a service manager's is not restricted with us
        self._read, self._found = read, deque[Configured]()
        self._reloading = Reloading(self._read_again)
        around = self.loop, self.router, self.log, self.people
        requesters = Requesters(*around, place.socket)
        requesters.whole_status = self.status
        # In the order in which they are closed: the links of daemons last.
        self.sources: list[Source] = [requesters, *(made(*around) for made in make)]
        self.sources.append(Registration(*around, place.registration_socket))
        self._waker = Waker()
        self.loop.add(self._waker, self._on_signal, URGENT)
        self._watchdog = self.loop.timer(self._alive)
        self._watchdog.at(self.manager.next_wake())

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
            self.people.reread()
        while self._found:
            self._follow(self._found.popleft())

    def _read_again(self) -> None:
        """In a thread of its own: files and directories of users may be slow."""
        if self._read is None:
            return
        try:
            self._found.append(self._read())
        except (UpcallError, OSError) as error:
            self.log("reload-failed", why=error)
            self.manager.ready(f"serving as before, configuration not reloaded: {error}")
        self._waker.wake()

    def harden(self, hardening: Hardening, may_hand_on: bool) -> None:
        """Says what this process has given up. `may_hand_on`: whether daemons could live with as little."""
        self.hardening, self._hands_on = hardening, may_hand_on
        self.log("privileges-dropped", **hardening._asdict())

    def _follow(self, found: Configured) -> None:
        """Does what the configuration says from the next request on; what is owed is owed as before."""
        router = self.router
        before, router.machine = router.machine, found.machine
        router.services, router.limits = found.services, found.limits
        if before != found.machine and router.registry.get(found.machine) is not None:
            for tell in router.on_registered:  # what is for the machine's daemon comes to this one from now on
                tell(found.machine)
        if found.command is not None and hands_on(found.command) and not self._hands_on:
            self.log("start-command-ignored", why="daemons would inherit what this broker has given up: start it anew")
        else:
            self.launcher.use(found.start)
        for source in self.sources:
            source.follow(found.owners)
        self.log("configuration-reloaded")
        self.manager.ready(f"serving {self.place.folder}, configuration reloaded")

    def run(self) -> None:
        """Serves until `stop`, then refuses what is owed and closes."""
        loop, router = self.loop, self.router
        self.log("broker-ready", folder=self.place.folder)
        self.manager.ready(f"serving {self.place.folder}")
        try:
            while not self._stopping:
                wake = min(router.next_wake(), loop.wake)
                ready = loop.wait(-1 if wake == math.inf else max(0.0, wake - loop.now))
                loop.since, loop.now = loop.now, time.monotonic()
                router.now = loop.now
                loop.run(ready, loop.now)
                if loop.now >= wake:
                    router.expire(loop.now)
                    loop.fire(loop.now)
        finally:
            self._close()

    def _alive(self, now: float) -> None:
        """The loop turns. A source that has broken off comes back with a new process only."""
        self.manager.alive(now, lambda: all(source.lives for source in self.sources))
        self._watchdog.at(self.manager.next_wake())

    def _close(self) -> None:
        self.manager.stopping()
        self.router.close()
        self.launcher.close()
        for source in self.sources:
            source.close()
        self.loop.remove(self._waker)
        self._waker.close()
        self.loop.close()
        self.log("broker-closed")
        self.log.flush()

    def status(self, uid: int | None) -> dict[str, object]:
        """For `upcall status`: of one uid, or of all."""
        found = self.router.status(self.loop.now, uid)
        found["broker"] = {
            "pid": os.getpid(),
            "uid": os.geteuid(),
            "machine": self.router.machine,
            "version": __version__,
            "sources": [source.name for source in self.sources],
            "hardening": {} if self.hardening is None else self.hardening._asdict(),
        }
        for source in self.sources:
            found |= source.status(uid)
        return found


def main(
    folder: Path | None = None,
    device: Path | None = None,
    contexts: int | None = None,
    quota: str = "no",
    records: str | None = None,
) -> None:
    """Runs a broker in this process until SIGTERM or SIGINT. OSError, UsageError, ConfigError before it is ready.

    SIGHUP has the configuration read again. `records`: where a record of each request goes
    (upcall/observe/recorder.py); None: as the configuration says. The others: upcall/protocols/protocol.py.
    """
    hangup = Hangup()
    manager = Manager()
    harden()
    raise_descriptor_limit()
    prefer_us()
    if device is not None:
        stay_in_memory()  # a page that comes back from a slow disk can take longer than the kernel's 3 s
    services = SERVICES if contexts is None else with_contexts(SERVICES, contexts)

    def read() -> Configured:
        return configured(services)

    found = read()
    place = own_place(folder)
    given = Given(place, device, quota, found.owners)
    make = [one for protocol in PROTOCOLS if (one := protocol.source(given)) is not None]
    where = _where(records)
    state = None
    if quota != "no":
        from upcall.protocols.quota.setup import state_file

        state = state_file(place)
    hardened = of_broker(place.folder, found.hardening, where, device, state, found.command)
    server = Server(place, make, found.services, None, found.start, read, manager, machine=found.machine)
    server.harden(hardened, not found.hardening or (found.command is not None and hands_on(found.command)))
    server.router.limits = found.limits
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
    server.router.record = record
    return record

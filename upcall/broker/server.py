"""Runs the broker's process: a loop, a router, registration, and a list of sources.

Threads: one runs everything; one writes the log; short-lived ones read the configuration and open /dev/ecryptfs.
Ownership: each descriptor belongs to one object, which removes it from the loop before closing it.
"""

from __future__ import annotations

import gc
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from upcall import __version__, config
from upcall.broker.launcher import COMMAND, Launcher
from upcall.broker.registration import Registration
from upcall.broker.settings import BrokerSettings, Configured, configured
from upcall.broker.source_listener import SourceListener
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
from upcall.process.trust import Fault, log_faults
from upcall.process.waker import Waker
from upcall.protocols.catalogue import PROTOCOLS, SERVICES
from upcall.protocols.local.source import Requesters
from upcall.protocols.protocol import Given

if TYPE_CHECKING:
    from upcall.observe.recorder import Recorder


class Server:
    """The broker. `run` blocks; only `stop` and `reload` may be called from other threads or signal handlers."""

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
        """`make`: makes the sources, in addition to that of user-space requesters. `start`: the command that starts a
        daemon. `read`: reloads the configuration; called in another thread. `manager`: the service manager, for
        status and watchdog. `machine`: the uid of the machine's daemon. OSError, UsageError."""
        self.place = place
        self.manager = manager or Manager({})
        self.log = log or EventLog("upcall-broker")
        self.people = people or People(self.log)
        self.log.person_of = self.people.of
        self.loop = Loop()
        self.launcher = Launcher(self.loop, self.log, lambda uid: self.router.given_up(uid), start)
        self.router = Router(services, self.log, self.launcher.start, machine, random_u32=_random_u32)
        self.router.person_of = self.people.of
        self._stopping = self._rereading = False
        self.hardening: Hardening | None = None
        self._hands_on = True  # whether daemons may be started as children, which inherit the broker's restrictions
        self._read, self._found = read, deque[Configured]()
        self._reloading = Reloading(self._read_again)
        around = self.loop, self.router, self.log, self.people
        requesters = Requesters(*around, place.socket)
        requesters.whole_status = self.status
        # Closed in this order: the links of daemons last.
        self.sources: list[Source] = [requesters, *(made(*around) for made in make)]
        self.sources.append(SourceListener(*around, place.source_socket))
        self.sources.append(Registration(*around, place.registration_socket))
        self._waker = Waker()
        self.loop.add(self._waker, self._on_signal, URGENT)
        self._watchdog = self.loop.timer(self._alive)
        self._watchdog.at(self.manager.next_wake())

    # --- running -------------------------------------------------------------------------------------------

    def stop(self, *_: object) -> None:
        """Ends `run`. From a signal handler or any thread."""
        self._stopping = True
        self._waker.wake()

    def reload(self, *_: object) -> None:
        """Schedules a reload of the configuration. From a signal handler or any thread."""
        self._rereading = True
        self._waker.wake()

    def heed_signals(self) -> None:
        """Installs `stop` as the handler of SIGTERM and SIGINT. In the main thread only."""
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
        """Reads the configuration, in a thread of its own: files and name services may be slow."""
        if self._read is None:
            return
        try:
            self._found.append(self._read())
        except (UpcallError, OSError) as error:
            self.log("reload-failed", why=error)
            self.manager.ready(f"serving as before, configuration not reloaded: {error}")
        self._waker.wake()

    def harden(self, hardening: Hardening, may_hand_on: bool) -> None:
        """Logs the dropped privileges. `may_hand_on`: whether daemons may inherit the restrictions."""
        self.hardening, self._hands_on = hardening, may_hand_on
        self.log("privileges-dropped", **hardening._asdict())

    def _follow(self, found: Configured) -> None:
        """Applies a reloaded configuration from the next request on. Pending requests are not affected."""
        router = self.router
        router.machine, router.services, router.limits = found.machine, found.services, found.limits
        if found.command is not None and hands_on(found.command) and not self._hands_on:
            self.log("start-command-ignored", why="daemons would inherit the broker's restrictions: restart it")
        else:
            self.launcher.use(found.start)
        for source in self.sources:
            source.follow(found.owners)
        self.log("configuration-reloaded")
        self.manager.ready(f"serving {self.place.folder}, configuration reloaded")

    def run(self) -> None:
        """Serves until `stop`, then refuses pending requests and closes all descriptors. Blocks."""
        loop, router = self.loop, self.router
        self.log("broker-ready", folder=self.place.folder)
        self.manager.ready(f"serving {self.place.folder}")
        try:
            while not self._stopping:
                wake = router.next_wake()
                ready = loop.wait_until(wake)
                router.now = loop.now
                loop.run(ready, loop.now)
                if loop.now >= wake:
                    router.expire(loop.now)
                loop.fire(loop.now)
        finally:
            self._close()

    def _alive(self, now: float) -> None:
        """Notifies the watchdog, unless a source has failed in a way that only a restart of the process fixes."""
        self.manager.alive(now, lambda: all(source.lives for source in self.sources))
        self._watchdog.at(self.manager.next_wake())

    def _close(self) -> None:
        self.manager.stopping()
        self.loop.over = True  # deferred work is done at once
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
        """Returns the data of `upcall status`: of one uid, or of all (None)."""
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


def _random_u32() -> int:
    return int.from_bytes(os.urandom(4), "little")  # `secrets` would cost 4 MB and 5 ms: it loads OpenSSL


def main(settings: BrokerSettings, faults: Sequence[Fault] = ()) -> None:
    """Runs a broker in this process until SIGTERM or SIGINT. OSError, UsageError, ConfigError before it is ready.

    SIGHUP reloads the configuration. `faults`: files that others could change, for the log.
    """
    hangup = Hangup()
    harden()
    raise_descriptor_limit()
    prefer_us()
    if settings.device is not None:
        stay_in_memory()  # paging in from a slow disk can take longer than the kernel's time-out of 3 s
    services = SERVICES if settings.contexts is None else with_contexts(SERVICES, settings.contexts)

    def read() -> Configured:
        return configured(services)

    found = read()
    place = own_place(settings.folder)
    given = Given(place, settings.device, found.owners)
    make = [one for protocol in PROTOCOLS if (one := protocol.source(given)) is not None]
    where = _where(settings.records)
    hardened = of_broker(place.folder, found.hardening, where, settings.device, found.command)
    manager = Manager()
    server = Server(place, make, found.services, None, found.start, read, manager, machine=found.machine)
    server.harden(hardened, not found.hardening or (found.command is not None and hands_on(found.command)))
    log_faults(faults, server.log)
    server.router.limits = found.limits
    server.heed_signals()
    record = _recorder(where, server)
    hangup.connect(server.reload, server.stop)
    gc.freeze()
    server.run()
    if record is not None:
        record.flush()


def _where(option: str | None) -> str:
    """Returns where records are written; "no": nowhere."""
    if option is None and not config.settings("log").get("requests", False):
        return "no"
    from upcall.observe.recorder import wanted  # imported only if needed

    return wanted(option, user=False)


def _recorder(where: str, server: Server) -> Recorder | None:
    if where == "no":
        return None
    from upcall.observe.recorder import recorder

    record = recorder("upcall-broker", where, server.log)
    server.router.record = record
    return record

"""The machine's daemon has a uid of its own: which requests it gets in root's place, and which never."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_broker_core import Link, Origin, right
from tests.test_broker_forwarders import GOOD, Forwarder, PlayedKeys
from upcall import config
from upcall.broker.server import Server
from upcall.broker.settings import configured
from upcall.core.errors import UpcallError
from upcall.core.messages import Answer, Requester
from upcall.core.router import Router
from upcall.daemon import plugin_discovery as finding
from upcall.daemon.plugins import Overrides
from upcall.process import machine
from upcall.protocols.catalogue import SERVICES
from upcall.protocols.request_key.key_types import KEY_TYPES
from upcall.testing.kernel import broker_below
from upcall.testing.played import PlayedDaemon
from upcall.testing.processes import PATIENCE, in_child, until
from upcall.wire.envelope import QUIT, pack_control

ROOT, MACHINE, ALICE = 0, 997, 5001
NETWORK = [name for name, service in SERVICES.items() if service.network]
REST = [name for name, service in SERVICES.items() if not service.network]
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


# --- whose daemon is asked -----------------------------------------------------------------------------------------


class House:
    """A broker with no check of bodies, and daemons of these uids."""

    def __init__(self, *uids: int, absent: str = "refuse") -> None:
        self.started: list[int] = []
        services = {
            name: service._replace(absent=absent, check=lambda asked, answer: None)
            for name, service in SERVICES.items()
        }
        self.broker = Router(services, lambda event, **fields: None, self._start, MACHINE, random_u32=lambda: 0)
        self.links = {uid: Link() for uid in uids}
        self.daemons = {uid: self.broker.helo(uid, uid + 1, uid + 1, link, 0.0) for uid, link in self.links.items()}

    def _start(self, uid: int) -> bool:
        self.started.append(uid)
        return False

    def ask(self, uid: int, service: str) -> Origin:
        origin = Origin()
        self.broker.ask(uid, service, Requester(uid, 1), b"body", origin, 0.0)
        return origin

    def asked(self) -> list[int]:
        return [uid for uid, link in self.links.items() if link.requests]


def reasons(origin: Origin) -> list[str]:
    return [getattr(outcome, "reason", "answered") for outcome in origin.outcomes]


def test_the_services_that_parse_network_data_are_key_types() -> None:
    assert {"cifs.spnego", "dns_resolver"} <= {*NETWORK} <= {*KEY_TYPES}
    assert sorted(REST) == ["ecryptfs", "key"]


@pytest.mark.parametrize("service", NETWORK)
def test_the_machines_daemon_answers_network_services_in_roots_place(service: str) -> None:
    house = House(ROOT, MACHINE, ALICE)
    origin = house.ask(ROOT, service)
    assert house.asked() == [MACHINE]
    (request,) = house.links[MACHINE].requests
    assert house.broker.answered(house.daemons[MACHINE], right(request))
    assert origin.outcomes == [Answer(b"re: body")]


@pytest.mark.parametrize("service", NETWORK)
def test_roots_own_daemon_is_never_asked_about_network_services(service: str) -> None:
    house = House(ROOT)
    assert reasons(house.ask(ROOT, service)) == ["no-daemon"]
    assert house.asked() == []


@pytest.mark.parametrize("service", REST)
def test_the_machines_daemon_is_never_asked_for_roots_keys(service: str) -> None:
    assert reasons(House(MACHINE).ask(ROOT, service)) == ["no-daemon"]
    house = House(MACHINE, ROOT)
    house.ask(ROOT, service)
    assert house.asked() == [ROOT]


@pytest.mark.parametrize("service", REST)
def test_an_answer_of_the_machines_daemon_for_roots_keys_is_rejected(service: str) -> None:
    """An answer with the right numbers, from the wrong daemon."""
    house = House(MACHINE, ROOT)
    origin = house.ask(ROOT, service)
    (request,) = house.links[ROOT].requests
    assert not house.broker.answered(house.daemons[MACHINE], right(request))
    assert origin.outcomes == []
    assert house.broker.answered(house.daemons[ROOT], right(request))
    assert origin.outcomes == [Answer(b"re: body")]


@pytest.mark.parametrize("service", NETWORK)
def test_the_machines_daemon_serves_users_without_a_daemon_only_if_configured(service: str) -> None:
    house = House(ROOT, MACHINE, absent="machine")
    house.ask(ALICE, service)
    assert house.asked() == [MACHINE]
    assert reasons(House(ROOT, absent="machine").ask(ALICE, service)) == ["no-daemon"]


def test_daemons_are_started_on_demand_for_users_but_not_for_root() -> None:
    house = House(absent="start")
    house.ask(ROOT, "dns_resolver")
    house.ask(ALICE, "dns_resolver")
    assert house.started == [ALICE]


def test_without_a_machine_user_roots_own_daemon_is_asked() -> None:
    house = House(ROOT)
    house.broker.machine = ROOT
    house.ask(ROOT, "cifs.spnego")
    assert house.asked() == [ROOT]


# --- as whom it runs -----------------------------------------------------------------------------------------------


@pytest.fixture
def accounts(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """passwd(5), as far as it is asked here: uid by name."""
    known: dict[str, int] = {}

    class Entry:
        def __init__(self, uid: int) -> None:
            self.pw_uid = uid

    monkeypatch.setattr(machine.pwd, "getpwnam", lambda name: Entry(known[name]))  # type: ignore[attr-defined]
    machine.uid.cache_clear()
    yield known
    machine.uid.cache_clear()


def configure(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> None:
    file = folder.parent / "system.toml"
    file.write_text(text)
    monkeypatch.setattr(config, "SYSTEM", file)


def test_the_machine_user_is_the_system_user_upcall_or_else_root(accounts: dict[str, int]) -> None:
    assert machine.read() == ROOT
    accounts["upcall"] = MACHINE
    assert machine.read() == MACHINE


def test_an_account_upcall_that_is_no_system_user_is_not_the_machine_user(accounts: dict[str, int]) -> None:
    accounts["upcall"] = 1000
    assert machine.read() == ROOT


def test_the_configuration_names_the_machine_user_and_an_unknown_one_is_an_error(
    accounts: dict[str, int], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    accounts |= {"upcall": MACHINE, "other": 2000, "root": 0}
    configure(monkeypatch, folder, '[daemon]\nmachine-user = "other"\n')
    assert (machine.read(), configured(SERVICES).machine) == (2000, 2000)
    configure(monkeypatch, folder, '[daemon]\nmachine-user = "root"\n')
    assert machine.read() == ROOT
    configure(monkeypatch, folder, '[daemon]\nmachine-user = "nobody-here"\n')
    with pytest.raises(UpcallError, match="there is no user 'nobody-here'"):
        machine.read()


def test_roots_daemon_has_no_handlers_if_there_is_a_machine_user(
    accounts: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: ROOT)
    assert finding.found(Overrides()).handlers
    machine.uid.cache_clear()
    accounts["upcall"] = MACHINE
    found = finding.found(Overrides())
    assert found.modules and not found.handlers
    monkeypatch.setattr(os, "geteuid", lambda: MACHINE)
    assert finding.found(Overrides()).handlers


# --- real uids -----------------------------------------------------------------------------------------------------


@pytest.fixture
def keys() -> PlayedKeys:
    """What the kernel would say of a key for root's own mount."""
    return PlayedKeys()


@pytest.fixture
def server(keys: PlayedKeys, folder: Path) -> Iterator[Server]:
    with broker_below(None, folder, keys) as running:
        running.router.machine = MACHINE
        yield running


@root_only
def test_a_daemon_of_the_machine_user_answers_roots_mount(server: Server, keys: PlayedKeys, folder: Path) -> None:
    """Root's own daemon is registered, too, and is not asked."""

    def serve() -> int:
        with PlayedDaemon(folder) as daemon:
            request = daemon.request()
            daemon.answer(request, GOOD)
            daemon.socket.send(pack_control(QUIT))
            daemon.receive()  # the broker's QUIT: it has the answer
            return request.requester.uid

    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(in_child(serve, MACHINE)))
    thread.start()
    until(lambda: server.router.registry.get(MACHINE) is not None, "the machine's daemon")
    with PlayedDaemon(folder):
        forwarder = Forwarder(folder, keys)
        forwarder.ask()
        assert forwarder.reason() == "answered"
        thread.join(PATIENCE)
        roots = server.router.registry.get(ROOT)
        assert roots is not None and (roots.answered, roots.refused) == (0, 0)
    assert found == [ROOT]

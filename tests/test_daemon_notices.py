"""Handlers in a real daemon: loaded when they are needed, and sent notices, which have no answer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from upcall.core.errors import ModuleFailed
from upcall.core.messages import Answer, Refusal, Requester
from upcall.daemon.plugins import Plugins, ServiceHandler
from upcall.daemon.settings import DaemonSettings
from upcall.keys.plugins import load_handler
from upcall.testing.played import PlayedBroker
from upcall.testing.processes import RunningDaemon, until
from upcall.wire.envelope import NOTICE, Envelope

HERE = Path(__file__).parent
HANDLERS = (
    ServiceHandler("test.echo", "answering:telling"),
    ServiceHandler("test.none", "answering:telling"),
    ServiceHandler("test.gone", "nowhere:it"),
)
LAZY = DaemonSettings(plugins=Plugins(handlers=HANDLERS))


class Told(PlayedBroker):
    """A broker, with a daemon that writes down what it is told."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.file = folder.parent / "told"
        self.file.touch()

    def tell(self, body: bytes, service: str = "test.echo") -> None:
        self.ask(0, body, service, kind=NOTICE)

    def told(self, *notices: bytes) -> None:
        wanted = sorted(notices)
        until(lambda: sorted(self.file.read_bytes().splitlines()) == wanted, "the notices")


@pytest.fixture
def broker(folder: Path) -> Told:
    return Told(folder)


@pytest.fixture
def daemon(folder: Path, broker: Told) -> Iterator[RunningDaemon]:
    environment = {"TOLD": str(broker.file)}
    with RunningDaemon(folder, folder.parent / "keys", {}, [HERE], settings=LAZY, environment=environment) as running:
        broker.register()
        yield running


def test_a_handler_is_loaded_at_its_first_request(broker: Told, daemon: RunningDaemon) -> None:
    broker.ask(1, b"hello", "test.echo")
    assert broker.response().outcome == Answer(b"hello")
    broker.ask(2, b"refuse", "test.echo")
    assert broker.response().outcome == Refusal("no-key", 126)
    daemon.logged("there is none in the drawer")


@pytest.mark.parametrize(("service", "why"), [("test.gone", "ModuleNotFoundError"), ("test.none", "do not name")])
def test_a_handler_that_cannot_be_loaded_refuses_its_requests_only(
    broker: Told, daemon: RunningDaemon, service: str, why: str
) -> None:
    for seq in (1, 2):
        broker.ask(seq, b"hello", service)
        outcome = broker.response().outcome
        assert isinstance(outcome, Refusal)
        assert outcome.reason == "module-failed"
    daemon.logged(why)
    broker.ask(3, b"hello", "test.echo")
    assert broker.response().outcome == Answer(b"hello")


def test_notices_reach_the_handler_and_are_not_answered(broker: Told, daemon: RunningDaemon) -> None:
    broker.tell(b"one")
    broker.tell(b"two")
    broker.told(b"one", b"two")
    broker.ask(7, b"after", "test.echo")
    assert broker.response().seq == 7


def test_a_notice_that_fails_is_logged_and_later_ones_are_delivered(broker: Told, daemon: RunningDaemon) -> None:
    broker.tell(b"fail")
    daemon.logged("cannot be told")
    broker.tell(b"anything", "test.unknown")
    daemon.logged("notice-unhandled")
    broker.tell(b"anything", "test.gone")
    daemon.logged("ModuleNotFoundError")
    broker.tell(b"three")
    broker.told(b"three")


def test_load_handler_refuses_invalid_specs_and_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    for spec, why in (("answering", "not of the form"), ("answering:os", "do not name"), ("nowhere:x", "nowhere")):
        with pytest.raises(ModuleFailed, match=why):
            load_handler(spec, "test.echo")
    deaf = load_handler("answering:deaf", "test.echo")
    assert deaf.answer(Envelope(1, 1, "test.echo", Requester(0, 0), time.monotonic_ns(), b"")) == b""

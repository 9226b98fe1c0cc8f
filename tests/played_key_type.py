"""Sends a key request of a system-wide type from a simulated kernel to a daemon and back, for tests of such types."""

from __future__ import annotations

from pathlib import Path

from tests.test_broker_forwarders import AUTHORISATION, KEY, ME, Forwarder, PlayedKeys
from upcall.core.messages import Answer
from upcall.protocols.request_key.messages import Ask, Described, Instance, pack_instance, take_ask
from upcall.testing.kernel import broker_below
from upcall.testing.played import PlayedDaemon


def goes_there_and_back(folder: Path, described: Described, payload: bytes, reason: str) -> None:
    """Asserts that a request ends with `reason` if the daemon answers with `payload`. "forged": the daemon does not
    receive it."""
    keys = PlayedKeys()
    keys.keys[KEY] = described
    with broker_below(None, folder, keys, owners={described.type: ME}), PlayedDaemon(folder) as daemon:
        forwarder = Forwarder(folder, keys)
        forwarder.ask()
        if reason != "forged":
            request = daemon.request()
            assert request.service == described.type
            assert take_ask(request.body) == Ask(described.description, b"")
            daemon.answer(request, Answer(pack_instance(Instance(600, payload))))
        outcome = forwarder.outcome()
        assert getattr(outcome, "reason", "answered") == reason
        if reason == "answered":
            assert outcome == Answer(pack_instance(Instance(600, payload)))


def is_forged(folder: Path, described: Described) -> None:
    keys = PlayedKeys()
    keys.keys[KEY] = described
    assert AUTHORISATION in keys.keys
    with broker_below(None, folder, keys, owners={described.type: ME}), PlayedDaemon(folder) as daemon:
        forwarder = Forwarder(folder, keys)
        forwarder.ask()
        assert forwarder.reason() == "forged"
        assert daemon.silent()

"""A daemon has both ends of its link: whatever it does with them, others are served as before."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

from tests.attacks.attacker import Attacker
from tests.attacks.hostile import TRICKS, hostile, pass_on
from tests.attacks.scene import ATTACKER, BEFORE, STRANGER, VICTIM, World, descriptors, serves
from tests.attacks.spin import spin
from upcall.testing.processes import until

pytestmark = pytest.mark.skipif(BEFORE, reason="that link has no copies")
ROUNDS = 3


@pytest.fixture
def listening(world: World) -> Iterator[Attacker]:
    """A process of a third uid, which receives whatever it can."""
    with Attacker(STRANGER, spin, world.network.enter) as made:
        yield made


@pytest.mark.parametrize("trick", [trick.__name__ for trick in TRICKS])
def test_a_hostile_daemon_disturbs_no_other_uid(world: World, listening: Attacker, trick: str) -> None:
    with world.broker() as broker, world.daemon() as daemon:
        world.wait_registered(daemon)
        serves(world, VICTIM)
        before = descriptors(broker.pid)
        play = partial(hostile, folder=world.folder, broker=broker.pid, trick=trick)
        with Attacker(ATTACKER, play, world.network.enter) as attacker:
            assert attacker.heard() > 0 or trick == "nothing_read"
            for _ in range(ROUNDS):
                assert attacker.asked("ask") == "asked"
                serves(world, VICTIM)
                serves(world, 0)
                attacker.asked("again")
                serves(world, VICTIM)
            assert world.registered(VICTIM) == daemon.pid
        until(lambda: world.registered(ATTACKER) is None, "the attacker is gone")
        until(lambda: descriptors(broker.pid) <= before, f"{before} descriptors, as before", 30)
        serves(world, VICTIM)
        assert broker.lives
        assert daemon.lives
        assert "unexpected-sender" not in daemon.log
        assert listening.asked("report")["got"] == []


def test_a_third_uid_that_was_passed_a_link_is_rejected(world: World) -> None:
    """Its messages on the daemon's link are rejected by their sender's uid."""
    with world.broker() as broker, world.daemon() as daemon:
        world.wait_registered(daemon)
        play = partial(pass_on, folder=world.folder, uid=ATTACKER, other=STRANGER)
        with Attacker(0, play, world.network.enter) as attacker:
            assert attacker.heard() > 0
            until(lambda: world.status()["junk"].get("uid", 0) > 0, "the stranger's to be refused")
            assert world.registered(ATTACKER) == attacker.pid
            assert world.registered(STRANGER) is None
            serves(world, VICTIM)
        assert broker.lives

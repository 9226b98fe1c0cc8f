"""The victim's daemon is killed while the broker asks it: no attacker gets the requests, which hold clear keys."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest

from tests.attacks import raw
from tests.attacks.attacker import Attacker, Told
from tests.attacks.forked import forked
from tests.attacks.scene import ATTACKER, BEFORE, IN_FLIGHT, VICTIM, Score, World, answers, leaked, tries
from tests.attacks.spin import spin
from upcall.testing.processes import until


def load(told: Told, world: World, packets: Sequence[bytes]) -> None:
    """Has the packets wrapped, over and over again, as many at once as can be."""
    connection = raw.connect(world.folder / "broker.sock", 60)
    for seq, packet in enumerate(packets):
        connection.send(raw.request(seq, seq, VICTIM, packet))
    told.say("started")
    while told.word(wait=False) != "end":
        data = connection.recv(raw.MOST)
        seq = int.from_bytes(data[8:12], "little")
        connection.send(raw.request(seq, seq, VICTIM, packets[seq]))


@pytest.mark.parametrize("windows", [(), ("epoll=0.02",)], ids=["as-it-is", "windows-open"])
def test_requests_to_a_killed_daemon_do_not_reach_an_attacker(world: World, windows: Sequence[str]) -> None:
    """The daemon's portid is free before its pidfd tells that it has ended."""
    score = Score(f"daemon killed, requests with clear keys, {'windows open' if windows else 'as it is'}")
    keys = world.victim.to_wrap(IN_FLIGHT)
    with (
        Attacker(ATTACKER, spin, world.network.enter) as attacker,
        world.broker(*windows) as broker,
        Attacker(VICTIM, partial(load, world=world, packets=list(keys.values()))) as asking,
    ):
        assert asking.heard() == "started"
        for _ in range(tries(30)):
            with world.daemon() as daemon:
                world.wait_registered(daemon)
                answered = world.outcomes("answered")
                world.until_outcomes("answered", answered + IN_FLIGHT)
                daemon.end()
                until(lambda: world.registered(VICTIM) is None, "the broker to notice", 30)
            report = attacker.asked("report")
            score.count(leaked(keys, report["got"]), IN_FLIGHT, report)
        assert broker.lives
    print(score)
    assert score.binds > score.tries
    if not BEFORE:
        assert score.keys == 0, str(score)


@pytest.mark.parametrize("windows", [(), ("close=0.02",)], ids=["as-it-is", "windows-open"])
def test_answers_of_a_killed_daemons_child_do_not_reach_an_attacker(world: World, windows: Sequence[str]) -> None:
    """32 unwraps are in flight when the registered process is killed; its child has its sockets, and answers."""
    score = Score(f"registered process killed, its child answers, {'windows open' if windows else 'as it is'}")
    with Attacker(ATTACKER, spin, world.network.enter) as attacker, world.broker(*windows):
        for _ in range(tries(30)):
            keys = world.victim.wrapped(IN_FLIGHT)
            bodies = {packet: raw.unwrapped(clear) for clear, packet in keys.items()}
            play = partial(forked, folder=world.folder, bodies=bodies)
            with Attacker(VICTIM, play, world.network.enter) as daemon, world.connected(VICTIM) as connection:
                daemon.heard()
                for seq, packet in enumerate(keys.values()):
                    connection.send(raw.request(seq, seq, VICTIM, packet))
                assert daemon.heard() == "holds"
                daemon.kill()
                until(lambda: world.registered(VICTIM) is None, "the broker to notice", 30)
                assert answers(connection, IN_FLIGHT) == [b""] * IN_FLIGHT
                for _ in range(2):  # so that it has tried every portid since
                    attacker.asked("look")
                sent = daemon.asked("answer")
                report = attacker.asked("report")
            score.count(leaked(keys, report["got"]), sent, report)
    print(score)
    assert score.binds > score.tries
    if not BEFORE:
        assert score.in_flight == score.tries * IN_FLIGHT
        assert score.keys == 0, str(score)

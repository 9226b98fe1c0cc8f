"""The broker is killed, or told to end, while the victim's daemon answers: no attacker gets the answers."""

from __future__ import annotations

import signal
from collections.abc import Sequence

import pytest

from tests.attacks import raw
from tests.attacks.attacker import Attacker
from tests.attacks.scene import ATTACKER, BEFORE, IN_FLIGHT, VICTIM, Score, World, answers, leaked, tries
from tests.attacks.spin import spin

# After close(2) of each socket, and before the end of a process is noticed.
BROKERS_WINDOWS, DAEMONS_WINDOWS = ("close=0.02",), ("poll=0.1",)
OPEN = pytest.mark.parametrize(
    ("brokers", "daemons"), [((), ()), (BROKERS_WINDOWS, DAEMONS_WINDOWS)], ids=["as-it-is", "windows-open"]
)


@OPEN
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_answers_to_a_broker_that_ends_do_not_reach_an_attacker(
    world: World, number: signal.Signals, brokers: Sequence[str], daemons: Sequence[str]
) -> None:
    """32 unwraps are in flight. An attacker takes every portid that becomes free."""
    score = Score(f"broker ended by {number.name}, {'windows open' if brokers else 'as it is'}")
    with Attacker(ATTACKER, spin, world.network.enter) as attacker, world.daemon(*daemons) as daemon:
        for _ in range(tries(12)):
            with world.broker(*brokers) as broker:
                daemon.logged("daemon-registered", score.tries + 1)  # pids come again
                keys = world.victim.wrapped(IN_FLIGHT)
                with world.connected(VICTIM) as connection:
                    for seq, packet in enumerate(keys.values()):
                        connection.send(raw.request(seq, seq, VICTIM, packet))
                    first = answers(connection, 1)
                    broker.end(number)
                    answered = [one for one in first + answers(connection, IN_FLIGHT) if one]
            daemon.logged("broker-gone", score.tries + 1)
            report = attacker.asked("report")
            score.count(leaked(keys, report["got"]), IN_FLIGHT - len(answered), report)
    print(score)
    assert score.in_flight > 0
    assert score.binds > score.tries
    if not BEFORE:
        assert score.keys == 0, str(score)

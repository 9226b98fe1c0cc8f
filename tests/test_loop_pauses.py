"""An owner whose callback took much processor time waits; others do not, nor does root."""

from __future__ import annotations

import math
import socket
import time
from collections import Counter

import pytest

from upcall.process import loop as loop_module
from upcall.process.loop import Loop

SLOW_UID, OTHER = 1000, 1001


def busy_for(seconds: float) -> None:
    ends = time.thread_time() + seconds
    while time.thread_time() < ends:
        pass


@pytest.mark.parametrize("slow", [SLOW_UID, 0], ids=["a user", "root"])
def test_an_owner_whose_callback_was_slow_waits_and_others_are_served(
    slow: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "_PAUSE", 1e6)  # longer than the test, however busy the machine is
    loop, calls = Loop(), Counter[str]()
    pairs = [socket.socketpair() for _ in range(3)]
    for (ours, theirs), name in zip(pairs, ("slow", "slow too", "other"), strict=True):
        theirs.send(b"x")  # and never read: it stays ready

        def callback(name: str = name) -> None:
            calls[name] += 1
            if name.startswith("slow"):
                busy_for(0.01)

        loop.add(ours, callback, OTHER if name == "other" else slow)

    def turn(later: float = 0.0) -> None:
        loop.now = time.monotonic() + later
        loop.run(loop.wait(0), loop.now)

    turn()  # a slow one ends the turn: its owner is watched, and comes last from now on
    assert (calls["slow"] + calls["slow too"], calls["other"]) == (1, 0)
    turn()  # the other one first; the slow one is measured, and its owner paused
    assert (calls["slow"] + calls["slow too"], calls["other"]) == (2, 1)
    assert (slow in loop._paused) is bool(slow)
    turn()
    assert (calls["slow"] + calls["slow too"], calls["other"]) == (2 if slow else 3, 2)
    loop.fire(math.inf)  # which ends the pause
    turn(later=1e6)
    assert (calls["slow"] + calls["slow too"], calls["other"]) == (3 if slow else 5, 3)
    for pair in pairs:
        for one in pair:
            one.close()
    loop.close()


def test_what_is_deferred_runs_on_its_owners_account() -> None:
    loop, ran = Loop(), list[int]()
    for number in range(3):
        loop.defer(SLOW_UID, lambda number=number: ran.append(number))  # type: ignore[misc]
    loop.defer(OTHER, lambda: ran.append(loop.running))
    for _ in range(3):
        loop.run(loop.wait(-1), time.monotonic())  # which does not wait while something is deferred
    assert sorted(ran) == [0, 1, 2, OTHER]
    assert [one for one in ran if one < 3] == [0, 1, 2]
    loop.charge(SLOW_UID, 10.0)
    assert loop.charged(SLOW_UID)
    assert not loop.charged(OTHER)
    loop.defer(SLOW_UID, lambda: ran.append(9))
    loop.run(loop.wait(0), loop.now)
    assert 9 not in ran, "its owner is paused"
    loop.over = True
    loop.defer(SLOW_UID, lambda: ran.append(10))
    assert ran[-1] == 10, "at the end nothing is deferred"
    loop.close()

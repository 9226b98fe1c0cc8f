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
    monkeypatch.setattr(loop_module, "_LONGEST", 1e6)
    monkeypatch.setattr(loop_module, "_IN_A_ROW", 1)
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


def _played(monkeypatch: pytest.MonkeyPatch, *used: float) -> dict[int, float]:
    """Serves an owner whose callbacks take these seconds of processor time. Returns who is paused, and until when: at
    the time 0."""
    clock = [0.0]
    loop = Loop()
    monkeypatch.setattr(time, "thread_time", lambda: clock[0])
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    times = iter(used)

    def callback() -> None:
        clock[0] += next(times)

    source = loop_module.Pollable(7, callback, SLOW_UID)
    loop._sources[7] = source
    for _ in used:
        clock[0] = 0.0
        loop.run([source], 0.0)
    loop.close()
    return loop._paused


def test_slow_callbacks_among_quick_ones_pause_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the host of a virtual machine preempts at random."""
    assert _played(monkeypatch, *[0.1, 0.1, 0.1, 0.0] * 10) == {}


def test_several_slow_callbacks_in_a_row_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _played(monkeypatch, 0.01, 0.01, 0.01, 0.01) == {SLOW_UID: pytest.approx(0.01 * loop_module._PAUSE)}


def test_no_pause_is_longer_than_a_request_can_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is suspended in a callback, or moved to another host, finds that it took minutes."""
    assert _played(monkeypatch, 100.0, 100.0, 100.0, 100.0) == {SLOW_UID: 1.0}


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


def test_an_owner_whose_work_for_others_is_slow_twice_is_paused_and_others_are_not() -> None:
    loop = Loop()
    loop._much = 0.05
    loop.now = time.monotonic()
    loop.measured(OTHER, busy_for, 0.0)
    loop.measured(SLOW_UID, busy_for, 0.1)  # slow by the clock: it may have been preempted
    assert not loop.charged(SLOW_UID)
    assert loop.measured(SLOW_UID, lambda: 7) == 7
    assert not loop.charged(SLOW_UID)
    with pytest.raises(ConnectionError):
        loop.measured(SLOW_UID, slow_failure)
    assert loop.charged(SLOW_UID)
    assert not loop.charged(OTHER)
    loop.close()


def slow_failure() -> None:
    busy_for(0.1)
    raise ConnectionError


def test_an_owner_that_only_waited_is_not_paused() -> None:
    loop, (ours, theirs) = Loop(), socket.socketpair()
    loop._much = 0.05
    loop.now = time.monotonic()
    ours.settimeout(0.1)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            loop.measured(SLOW_UID, ours.recv, 1)
    assert not loop.charged(SLOW_UID)
    for one in (ours, theirs):
        one.close()
    loop.close()

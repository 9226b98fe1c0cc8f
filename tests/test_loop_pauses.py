"""An owner whose callback took much processor time waits; others do not, nor does root."""

from __future__ import annotations

import socket
import time
from collections import Counter

import pytest

from upcall.process.loop import Loop

SLOW_UID, OTHER = 1000, 1001


def busy_for(seconds: float) -> None:
    ends = time.thread_time() + seconds
    while time.thread_time() < ends:
        pass


@pytest.mark.parametrize("slow", [SLOW_UID, 0], ids=["a user", "root"])
def test_an_owner_whose_callback_was_slow_waits_and_others_are_served(slow: int) -> None:
    loop, calls = Loop(), Counter[str]()
    pairs = [socket.socketpair() for _ in range(3)]
    for (ours, theirs), name in zip(pairs, ("slow", "slow too", "other"), strict=True):
        theirs.send(b"x")  # and never read: it stays ready

        def callback(name: str = name) -> None:
            calls[name] += 1
            if name.startswith("slow"):
                busy_for(0.01)

        loop.add(ours, callback, OTHER if name == "other" else slow)
    now = time.monotonic()
    for _ in range(3):  # the first is seen to be slow; in the second one callback is measured, and its owner paused
        loop.run(loop.wait(0), now)
    assert calls["other"] == 3
    assert calls["slow"] + calls["slow too"] == (3 if slow else 6)
    loop.fire(now + 100)
    loop.run(loop.wait(0), now + 100)
    assert calls["slow"] + calls["slow too"] == (4 if slow else 8)
    for pair in pairs:
        for one in pair:
            one.close()
    loop.close()

"""When a module that keeps breaking is tried again."""

from __future__ import annotations

import pytest

from upcall.core.errors import Refused
from upcall.daemon.isolation.breaker import LIMIT, Breaker


def broken(times: int, now: float = 100.0) -> Breaker:
    breaker = Breaker()
    for _ in range(times):
        breaker.failed(now)
    return breaker


def refused(breaker: Breaker, now: float, deadline: float = 1000.0) -> bool:
    try:
        breaker.admit(now, deadline)
    except Refused as error:
        assert error.reason == "module-off"
        return True
    return False


def test_a_closed_breaker_admits_every_request_at_once() -> None:
    assert [Breaker().admit(0.0, 1.0) for _ in range(3)] == [0.0] * 3


def test_after_one_failure_requests_pass_at_once_and_after_two_with_a_delay() -> None:
    assert broken(1).admit(100.0, 110.0) == 0.0
    assert broken(2).admit(100.0, 110.0) == pytest.approx(0.1)
    assert broken(2).admit(100.06, 110.0) == pytest.approx(0.04)
    assert refused(broken(2), 100.0, deadline=100.05)  # it would come too late


@pytest.mark.parametrize(("times", "pause"), [(3, 0.2), (4, 0.4), (7, 3.2), (8, 5.0), (500, 5.0)])
def test_an_open_breaker_refuses_all_until_its_pause_ends_then_admits_one_trial(times: int, pause: float) -> None:
    breaker = broken(times)
    assert breaker.state(100.0) == "off"
    assert refused(breaker, 100.0)
    assert refused(breaker, 100.0 + pause - 0.01)
    now = 100.0 + pause + 0.01
    assert breaker.state(now) == "trial"
    assert breaker.admit(now, now + 2) == 0.0
    assert refused(breaker, now + 1)
    assert not refused(breaker, now + 2)  # nothing has been heard of it


def test_a_successful_trial_closes_the_breaker() -> None:
    breaker = broken(LIMIT)
    breaker.admit(101.0, 110.0)
    breaker.succeeded()
    assert breaker.state(101.0) == "closed"
    assert [breaker.admit(101.0, 110.0) for _ in range(3)] == [0.0] * 3


def test_an_undecided_trial_lets_the_next_request_be_the_trial() -> None:
    breaker = broken(LIMIT)
    breaker.admit(101.0, 110.0)
    breaker.undecided()
    assert not refused(breaker, 101.0)
    breaker.failed(102.0)
    assert refused(breaker, 102.0)

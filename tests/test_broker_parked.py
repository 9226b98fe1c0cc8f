"""Requests for a uid that has no daemon: refused, asked of the machine, or parked until one was started."""

from __future__ import annotations

import itertools
import math

import pytest

from tests.test_broker_core import OTHER, SERVICES, UID, WHO, Link, Origin, ask, right
from upcall.core.messages import Answer, Requester
from upcall.core.router import ROOT, Router


class Starter:
    """What starts daemons; `possible` says whether it can."""

    def __init__(self) -> None:
        self.possible = True
        self.asked: list[int] = []

    def start(self, uid: int) -> bool:
        self.asked.append(uid)
        return self.possible


@pytest.fixture
def starter() -> Starter:
    return Starter()


@pytest.fixture
def broker(starter: Starter) -> Router:
    return Router(SERVICES, lambda *_, **__: None, starter.start, random_u32=lambda: 0)


def register(broker: Router, uid: int = UID, now: float = 1.0) -> Link:
    link = Link()
    broker.helo(uid, 7 + uid, 70 + uid, link, now)
    return link


def test_parked_requests_are_sent_when_the_daemon_registers(broker: Router, starter: Starter) -> None:
    origins = [ask(broker, "started"), ask(broker, "started")]
    assert starter.asked == [UID, UID]
    assert [origin.outcomes for origin in origins] == [[], []]
    assert broker.next_wake() == 5.0
    link = register(broker)
    assert [request.deadline_ns for request in link.requests] == [5 * 10**9] * 2  # as if asked at once
    association = broker.registry.get(UID)
    assert association is not None
    for request in link.requests:
        assert broker.answered(association, right(request))
    assert [origin.outcomes for origin in origins] == [[Answer(b"re: body")]] * 2


def test_a_request_parked_for_another_uid_stays_parked(broker: Router) -> None:
    origin = ask(broker, "started", uid=OTHER)
    register(broker)
    assert origin.outcomes == []
    broker.given_up(UID)
    assert origin.outcomes == []


def test_a_service_without_start_on_demand_refuses_at_once(broker: Router, starter: Starter) -> None:
    assert ask(broker, "short").reason == "no-daemon"
    assert starter.asked == []


def test_a_request_is_refused_if_no_daemon_can_be_started(broker: Router, starter: Starter) -> None:
    starter.possible = False
    assert ask(broker, "started").reason == "no-daemon"


def test_parked_requests_are_refused_if_the_start_fails(broker: Router) -> None:
    origin = ask(broker, "started")
    broker.given_up(UID)
    assert origin.reason == "no-daemon"
    broker.given_up(UID)
    assert not register(broker).requests


def test_parked_requests_without_a_registration_are_refused_at_their_deadlines(broker: Router) -> None:
    first, second = ask(broker, "started", deadline=2.0), ask(broker, "started", now=1.0)
    broker.expire(2.0)
    assert (first.reason, second.outcomes) == ("no-daemon", [])
    assert broker.next_wake() == 6.0
    broker.expire(6.0)
    assert second.reason == "no-daemon"
    assert broker.next_wake() == math.inf


def test_no_more_requests_are_parked_than_the_service_has_contexts(broker: Router) -> None:
    origins = [ask(broker, "started") for _ in range(3)]
    assert [bool(origin.outcomes) for origin in origins] == [False, False, True]
    assert origins[2].reason == "no-context"


def test_parked_requests_are_refused_when_the_broker_ends(broker: Router) -> None:
    origin = ask(broker, "started")
    broker.close()
    assert origin.reason == "closing"


def test_the_machines_daemon_answers_for_a_uid_without_a_daemon(broker: Router) -> None:
    root, mine = register(broker, ROOT), None
    origin = Origin()
    broker.ask(UID, "machine", WHO, b"body", origin, 1.0)
    (request,) = root.requests
    assert request.requester == Requester(UID, 99)
    mine = register(broker)
    ask(broker, "machine", now=1.0)
    assert [len(link.requests) for link in (root, mine)] == [1, 1]
    for association, link in zip(sorted(broker.registry, key=lambda one: one.uid), (root, mine), strict=True):
        assert broker.answered(association, right(link.requests[0]))
    assert origin.reason == "answered"


def test_a_request_is_refused_without_a_users_or_the_machines_daemon(broker: Router) -> None:
    assert ask(broker, "machine").reason == "no-daemon"
    assert ask(broker, "machine", uid=ROOT).reason == "no-daemon"


@pytest.mark.parametrize("order", list(itertools.permutations(["helo", "expire", "given up"])), ids="-".join)
def test_a_parked_request_is_settled_once_in_any_order_of_events(broker: Router, order: tuple[str, ...]) -> None:
    origin = ask(broker, "started", deadline=2.0)
    for what in order:
        if what == "helo":
            register(broker)
        elif what == "expire":
            broker.expire(3.0)
        else:
            broker.given_up(UID)
    broker.expire(99.0)
    assert len(origin.outcomes) == 1

"""The router with played links, origins and clock: every origin is settled exactly once."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from upcall.core.errors import PeerError
from upcall.core.latency import BOUNDS
from upcall.core.messages import Answer, Refusal, Requester
from upcall.core.registry import Association
from upcall.core.router import Limits, Router
from upcall.core.service import Service
from upcall.wire.envelope import QUIT, REQUEST, Envelope, pack_response, refusal, take_message, take_request

UID, OTHER = 1000, 1001
WHO = Requester(UID, 99)


def check(asked: bytes, answer: bytes) -> None:
    if answer != b"re: " + asked:
        raise PeerError("answer", "is wrong")


SERVICES = {
    "short": Service("short", 2.5, 2, 0, check, len, local=True),
    "long": Service("long", 10.0, 3, 0, check, len, local=True),
    "started": Service("started", 5.0, 2, 0, check, len, local=True, absent="start"),
    "machine": Service("machine", 5.0, 2, 0, check, len, local=True, absent="machine"),
}


class Origin:
    def __init__(self, wants_why: bool = False) -> None:
        self.wants_why = wants_why
        self.outcomes: list[Answer | Refusal] = []

    def settle(self, outcome: Answer | Refusal, /) -> None:
        self.outcomes.append(outcome)

    @property
    def reason(self) -> str:
        assert len(self.outcomes) == 1, self.outcomes
        return self.outcomes[0].reason if isinstance(self.outcomes[0], Refusal) else "answered"


class Link:
    """Keeps what is sent. `state` is "well", "full" or "gone"."""

    def __init__(self) -> None:
        self.state = "well"
        self.requests: list[Envelope] = []
        self.quits = self.closed = 0

    def send(self, data: bytes, /) -> bool:
        assert not self.closed, "sent to a closed link"
        if self.state == "gone":
            raise ConnectionRefusedError
        if self.state == "full":
            return False
        kind = take_message(data).type
        if kind == REQUEST:
            self.requests.append(take_request(data))
        else:
            assert kind == QUIT
            self.quits += 1
        return True

    def close(self) -> None:
        self.closed += 1


class Played(NamedTuple):
    broker: Router
    link: Link
    daemon: Association
    events: list[str]


@pytest.fixture
def played() -> Played:
    return play()


def play() -> Played:
    events: list[str] = []
    broker = Router(SERVICES, lambda event, **fields: events.append(event), random_u32=lambda: 0)
    link = Link()
    return Played(broker, link, broker.helo(UID, 7, 70, link, 0.0), events)


def ask(
    broker: Router, service: str = "short", uid: int = UID, now: float = 0.0, deadline: float = math.inf
) -> Origin:
    origin = Origin()
    broker.ask(uid, service, WHO, b"body", origin, now, deadline)
    return origin


def right(request: Envelope) -> bytes:
    return pack_response(request.seq, request.index, Answer(b"re: " + request.body))


def test_a_request_is_sent_and_settled_once_by_the_first_answer_that_fits(played: Played) -> None:
    broker, link, daemon, _ = played
    origin = ask(broker)
    (request,) = link.requests
    assert (request.service, request.requester, request.body) == ("short", WHO, b"body")
    assert request.deadline_ns == 2_500_000_000
    assert origin.outcomes == []
    assert broker.answered(daemon, right(request))
    assert origin.outcomes == [Answer(b"re: body")]
    assert not broker.answered(daemon, right(request))
    assert len(origin.outcomes) == 1
    assert broker.outcomes[UID] == Counter({("short", "answered"): 1})
    assert broker.rejected[UID] == Counter({"state": 1})


def test_each_settled_request_is_recorded_with_its_outcome_and_latency(played: Played) -> None:
    broker, link, daemon, _ = played
    records: list[tuple[object, ...]] = []
    broker.record = lambda *record: records.append(record)
    ask(broker, now=1.0)
    broker.now = 1.003
    broker.answered(daemon, right(link.requests[0]))
    ask(broker, uid=OTHER, now=1.003)
    ask(broker, now=2.0)
    broker.now = 5.0
    broker.expire(5.0)
    told = [(*record[:3], round(float(str(record[3])), 6), record[4]) for record in records]
    first, second = (request.seq for request in link.requests)
    assert told == [
        (UID, "short", "answered", 0.003, first),
        (OTHER, "short", "no-daemon", 0.0, 0),
        (UID, "short", "timed-out", 3.0, second),
    ]
    status = broker.status(5.0)["latencies"]
    assert status == {"short": {"bounds": list(BOUNDS), "counts": [0, 0, 0, 1, 0, 0, 0, 0, 1, 0], "seconds": 3.003}}
    assert "latencies" not in broker.status(5.0, UID)


def test_a_request_without_a_daemon_is_refused(played: Played) -> None:
    assert ask(played.broker, uid=OTHER).reason == "no-daemon"


def test_requests_beyond_the_services_contexts_are_refused(played: Played) -> None:
    origins = [ask(played.broker) for _ in range(3)]
    assert origins[2].reason == "no-context"
    assert [origin.outcomes for origin in origins[:2]] == [[], []]
    assert ask(played.broker, "long").outcomes == []  # another service has contexts of its own


def test_a_daemons_refusal_reaches_the_requester(played: Played) -> None:
    broker, link, daemon, _ = played
    origin = ask(broker)
    broker.answered(daemon, pack_response(link.requests[0].seq, link.requests[0].index, Refusal("moon-phase", 999)))
    assert origin.outcomes == [Refusal("moon-phase", 999)]
    assert broker.outcomes[UID] == Counter({("short", "other"): 1})
    assert (daemon.answered, daemon.refused) == (0, 1)


def test_only_a_process_that_wants_to_know_is_told_why(played: Played) -> None:
    broker, link, daemon, _ = played
    for wants in (True, False):
        origin = Origin(wants)
        broker.ask(UID, "short", Requester(UID, 5), b"body", origin, 0.0)
        request = link.requests[-1]
        assert request.wants_why is wants
        broker.answered(daemon, pack_response(request.seq, request.index, Refusal("locked", 128, "since noon")))
        assert origin.outcomes == [Refusal("locked", 128, "since noon" if wants else "")]


@pytest.mark.parametrize("requester", [0, OTHER])
def test_a_requester_of_another_uid_is_not_told_why(played: Played, requester: int) -> None:
    broker, link, daemon, _ = played
    origin = Origin(wants_why=True)
    broker.ask(UID, "short", Requester(requester, 5), b"body", origin, 0.0)
    (request,) = link.requests
    assert not request.wants_why
    broker.answered(daemon, pack_response(request.seq, request.index, Refusal("locked", 128, "since noon")))
    assert origin.outcomes == [Refusal("locked", 128)]


def test_the_machines_daemon_tells_no_user_why(played: Played) -> None:
    broker, link, origin = played.broker, Link(), Origin(wants_why=True)
    machine = broker.helo(0, 8, 80, link, 0.0)
    broker.ask(OTHER, "machine", Requester(OTHER, 5), b"body", origin, 0.0)
    (request,) = link.requests
    assert not request.wants_why
    broker.answered(machine, pack_response(request.seq, request.index, Refusal("locked", 128, "since noon")))
    assert origin.outcomes == [Refusal("locked", 128)]


@pytest.mark.parametrize("why", [b"", b"\x1b[2J", b"x" * 201])
def test_a_malformed_why_is_a_bad_answer(played: Played, why: bytes) -> None:
    broker, link, daemon, _ = played
    origin = Origin(wants_why=True)
    broker.ask(UID, "short", Requester(UID, 5), b"body", origin, 0.0)
    request = link.requests[0]
    refused = bytearray(pack_response(request.seq, request.index, Answer(b"locked\0" + why)))
    refused[25] = 1  # status
    broker.answered(daemon, bytes(refused))
    assert origin.outcomes == [refusal("bad-answer")]


@pytest.mark.parametrize("cut", [24, 25, 27, 28])
def test_an_answer_with_garbage_behind_a_fitting_envelope_settles_as_bad_answer(played: Played, cut: int) -> None:
    """Once index and sequence fit, the request is settled, even if the rest is garbage."""
    broker, link, daemon, _ = played
    origin = ask(broker)
    assert broker.answered(daemon, right(link.requests[0])[:cut])
    assert origin.outcomes == [refusal("bad-answer")]


def test_a_message_shorter_than_an_envelope_is_rejected_and_settles_nothing(played: Played) -> None:
    broker, link, daemon, _ = played
    origin = ask(broker)
    assert not broker.answered(daemon, right(link.requests[0])[:23])
    assert origin.outcomes == []
    assert broker.rejected[UID] == Counter({"length": 1})
    assert broker.answered(daemon, right(link.requests[0]))
    assert origin.reason == "answered"


def test_an_answer_that_fails_the_services_check_settles_as_bad_answer(played: Played) -> None:
    broker, link, daemon, _ = played
    origin = ask(broker)
    request = link.requests[0]
    broker.answered(daemon, pack_response(request.seq, request.index, Answer(b"something else")))
    assert origin.reason == "bad-answer"


def test_requests_time_out_in_order_of_their_deadlines_and_late_answers_are_rejected(played: Played) -> None:
    broker, link, daemon, _ = played
    assert broker.next_wake() == math.inf
    first, second = ask(broker, "long"), ask(broker, "short", now=1.0)
    third = ask(broker, "long", now=1.0, deadline=2.0)
    assert broker.next_wake() == 2.0
    broker.expire(1.99)
    assert third.outcomes == []
    broker.expire(2.0)
    assert third.reason == "timed-out"
    assert broker.next_wake() == 3.5
    broker.expire(5.0)
    assert second.reason == "timed-out"
    assert broker.next_wake() == 10.0
    assert not broker.answered(daemon, right(link.requests[1]))
    assert broker.answered(daemon, right(link.requests[0]))
    assert first.reason == "answered"


def test_a_requesters_deadline_is_capped_by_the_services_time_out(played: Played) -> None:
    origin = ask(played.broker, "short", deadline=1000.0)
    played.broker.expire(2.5)
    assert origin.reason == "timed-out"


def test_a_newer_daemon_is_sent_pending_requests_and_old_answers_are_rejected(played: Played) -> None:
    broker, link, daemon, _ = played
    origin = ask(broker)
    successor = Link()
    second = broker.helo(UID, 8, 80, successor, 1.0)
    assert (link.quits, link.closed) == (1, 1)
    (old,), (new,) = link.requests, successor.requests
    assert (new.body, new.deadline_ns) == (old.body, old.deadline_ns)
    assert new.seq != old.seq
    assert not broker.answered(daemon, right(old))
    assert broker.answered(second, right(new))
    assert origin.reason == "answered"


def test_a_replacement_in_the_same_process_is_told_apart_by_the_sequence_number(played: Played) -> None:
    """Two sockets of one process have one pid: only the sequence number tells the replies apart."""
    broker, link, _, _ = played
    origin = ask(broker)
    successor = Link()
    second = broker.helo(UID, 7, 71, successor, 1.0)
    assert not broker.answered(second, right(link.requests[0]))
    assert broker.answered(second, right(successor.requests[0]))
    assert origin.reason == "answered"


@pytest.mark.parametrize(("state", "reason"), [("full", "daemon-full"), ("gone", "daemon-gone")])
def test_a_daemon_whose_link_is_full_or_gone_has_its_request_refused(played: Played, state: str, reason: str) -> None:
    played.link.state = state
    assert ask(played.broker).reason == reason
    assert (played.broker.registry.get(UID) is None) == (state == "gone")


@pytest.mark.parametrize(("state", "reason"), [("full", "daemon-full"), ("gone", "daemon-gone")])
def test_a_newer_daemon_whose_link_is_full_or_gone_has_pending_requests_refused(
    played: Played, state: str, reason: str
) -> None:
    origins = [ask(played.broker), ask(played.broker, "long")]
    successor = Link()
    successor.state = state
    played.broker.helo(UID, 8, 80, successor, 1.0)
    assert [origin.reason for origin in origins] == [reason, reason]


def test_a_daemon_that_dies_settles_only_its_own_uids_requests(played: Played) -> None:
    broker, _, daemon, _ = played
    other = Link()
    broker.helo(OTHER, 8, 80, other, 0.0)
    mine, theirs = ask(broker), ask(broker, uid=OTHER)
    broker.gone(daemon)
    assert (mine.reason, theirs.outcomes) == ("daemon-gone", [])
    assert ask(broker).reason == "no-daemon"


def test_a_quitting_daemon_may_answer_its_pending_requests_but_gets_no_new_ones(played: Played) -> None:
    broker, link, daemon, _ = played
    first, second = ask(broker), ask(broker)
    broker.quit(daemon)
    assert (link.quits, daemon.leaving) == (0, True)
    assert ask(broker).reason == "no-daemon"
    broker.answered(daemon, right(link.requests[0]))
    assert (first.reason, link.quits) == ("answered", 0)
    broker.answered(daemon, right(link.requests[1]))
    assert (second.reason, link.quits, link.closed) == ("answered", 1, 1)
    assert broker.registry.get(UID) is None


def test_a_daemon_that_quits_with_nothing_pending_is_released_at_once(played: Played) -> None:
    played.broker.quit(played.daemon)
    assert (played.link.quits, played.link.closed) == (1, 1)


def test_a_quitting_daemon_is_released_when_its_last_request_times_out(played: Played) -> None:
    origin = ask(played.broker)
    played.broker.quit(played.daemon)
    played.broker.expire(2.5)
    assert (origin.reason, played.link.quits, len(played.broker.registry)) == ("timed-out", 1, 0)


def test_quit_of_a_daemon_that_is_gone_closes_its_link_and_is_logged(played: Played) -> None:
    played.link.state = "gone"
    played.broker.quit(played.daemon)
    assert (played.link.closed, played.events) == (1, ["quit-failed"])


def test_a_newer_daemon_takes_over_the_requests_of_one_that_is_leaving(played: Played) -> None:
    origin = ask(played.broker)
    played.broker.quit(played.daemon)
    successor = Link()
    second = played.broker.helo(UID, 8, 80, successor, 1.0)
    assert played.link.closed == 1
    played.broker.answered(second, right(successor.requests[0]))
    assert (origin.reason, successor.quits) == ("answered", 0)


def test_a_request_is_refused_when_sequence_numbers_are_exhausted(played: Played) -> None:
    contexts = played.broker.contexts_of(UID)
    assert contexts is not None
    contexts._used = 1 << 32
    assert ask(played.broker).reason == "no-context"
    assert contexts.in_use == 0


def test_status_of_one_uid_shows_only_that_uid_and_no_request_bodies(played: Played) -> None:
    broker = played.broker
    broker.helo(OTHER, 8, 80, Link(), 0.0)
    ask(broker, now=1.0)
    ask(broker, uid=OTHER, now=1.0)
    mine, everything = broker.status(2.0, UID), broker.status(2.0)
    assert isinstance(mine["daemons"], list)
    assert isinstance(everything["daemons"], list)
    assert [daemon["uid"] for daemon in mine["daemons"]] == [UID]
    assert [daemon["uid"] for daemon in everything["daemons"]] == [UID, OTHER]
    (pending,) = mine["daemons"][0]["pending"]
    assert (pending["service"], pending["age"]) == ("short", 1.0)
    assert "body" not in repr(everything)


def test_status_counts_rejections_before_there_is_any_outcome(played: Played) -> None:
    ask(played.broker)
    played.broker.answered(played.daemon, b"junk")
    assert played.broker.status(0.0)["rejected"] == played.broker.status(0.0, UID)["rejected"] == {"length": 1}


class AnyOrder(RuleBasedStateMachine):
    """Two uids whose daemons register, end, answer wrongly or late, in any order."""

    uids = st.sampled_from([UID, OTHER])
    services = st.sampled_from(sorted(SERVICES))

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.broker = Router(SERVICES, lambda event, **fields: None, random_u32=lambda: 0)
        self.pids = itertools.count(1)
        self.asked: list[tuple[int, float, Origin]] = []  # uid, deadline, who asked
        self.daemons: list[tuple[Association, Link]] = []

    @rule(uid=uids, state=st.sampled_from(["well", "well", "well", "full", "gone"]))
    def helo(self, uid: int, state: str) -> None:
        link = Link()
        link.state = state
        self.daemons.append((self.broker.helo(uid, next(self.pids), 0, link, self.now), link))

    @rule(uid=uids, service=services, patience=st.sampled_from([0.0, 0.5, 3.0, math.inf]))
    def ask(self, uid: int, service: str, patience: float) -> None:
        origin = Origin()
        deadline = self.now + min(patience, SERVICES[service].patience)
        self.asked.append((uid, deadline, origin))
        body = f"{len(self.asked)}".encode()
        self.broker.ask(uid, service, Requester(uid, 1), body, origin, self.now, self.now + patience)

    def open_link(self, data: st.DataObject) -> tuple[Association, Link] | None:
        still = [pair for pair in self.daemons if not pair[1].closed]
        return data.draw(st.sampled_from(still)) if still else None

    @rule(data=st.data(), how=st.sampled_from(["right", "right", "twice", "wrong", "refuse", "seq", "index", "junk"]))
    def answer(self, data: st.DataObject, how: str) -> None:
        """Any request that this link was ever sent: pending, answered, late, or handed on."""
        pair = self.open_link(data)
        if pair is None or not pair[1].requests:
            return
        daemon, link = pair
        request = data.draw(st.sampled_from(link.requests))
        message = right(request)
        if how == "wrong":
            message = pack_response(request.seq, request.index, Answer(b"nonsense"))
        elif how == "refuse":
            message = pack_response(request.seq, request.index, refusal("locked"))
        elif how == "seq":
            message = pack_response((request.seq + 1) % (1 << 32), request.index, Answer(b""))
        elif how == "index":
            message = pack_response(request.seq, 1 << 20, Answer(b""))
        elif how == "junk":
            message = message[: data.draw(st.integers(0, len(message)))]
        self.broker.answered(daemon, message)
        if how == "twice" and not link.closed:
            assert not self.broker.answered(daemon, message)

    @rule(data=st.data(), state=st.sampled_from(["well", "full", "gone"]))
    def link_changes(self, data: st.DataObject, state: str) -> None:
        pair = self.open_link(data)
        if pair is not None and pair[1].state != "gone":
            pair[1].state = state

    @rule(data=st.data())
    def quit(self, data: st.DataObject) -> None:
        pair = self.open_link(data)
        if pair is not None:
            self.broker.quit(pair[0])

    @rule(data=st.data())
    def gone(self, data: st.DataObject) -> None:
        if self.daemons:
            self.broker.gone(data.draw(st.sampled_from(self.daemons))[0])  # also one that went before

    @rule(by=st.sampled_from([0.0, 0.4, 2.5, 11.0]))
    def time_passes(self, by: float) -> None:
        self.now += by
        self.broker.expire(self.now)
        for _, deadline, origin in self.asked:
            assert origin.outcomes or deadline > self.now, "past its deadline and not settled"

    @invariant()
    def nobody_is_settled_twice_and_nothing_leaks(self) -> None:
        open_ones: Counter[int] = Counter()
        for number, (uid, deadline, origin) in enumerate(self.asked, 1):
            assert len(origin.outcomes) <= 1
            if not origin.outcomes:
                open_ones[uid] += 1
                assert self.broker.next_wake() <= deadline
            elif isinstance(origin.outcomes[0], Answer):
                assert origin.outcomes[0].body == b"re: %d" % number, "somebody else's answer"
        for uid in (UID, OTHER):
            contexts = self.broker.contexts_of(uid)
            assert (contexts.in_use if contexts else 0) == open_ones[uid]
            association = self.broker.registry.get(uid)
            assert (contexts is None) == (association is None)
        for daemon, link in self.daemons:
            assert link.closed or self.broker.registry.get(daemon.uid) is daemon
            assert not (daemon.leaving and not link.closed and not open_ones[daemon.uid])

    def teardown(self) -> None:
        self.now += 100.0
        self.broker.expire(self.now)
        assert all(len(origin.outcomes) == 1 for _, _, origin in self.asked)
        assert self.broker.next_wake() == math.inf
        counted = sum(sum(counts.values()) for counts in self.broker.outcomes.values())
        assert counted == len(self.asked)


AnyOrder.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestAnyOrder = AnyOrder.TestCase


def test_reserved_contexts_are_kept_for_another_uid_while_one_is_registered() -> None:
    """All uids share the kernel's contexts: while another uid is registered, no uid gets the last ones."""
    services = {"short": SERVICES["short"]._replace(contexts=4, reserve=1)}
    broker = Router(services, lambda *_, **__: None, random_u32=lambda: 0)
    broker.helo(UID, 1, 1, Link(), 0.0)
    alone = [ask(broker) for _ in range(5)]
    assert [origin.outcomes for origin in alone] == [[], [], [], [], [refusal("no-context")]]
    broker.close()
    broker.helo(OTHER, 2, 2, Link(), 0.0)
    crowded = [ask(broker) for _ in range(4)]
    assert [origin.outcomes for origin in crowded] == [[], [], [], [refusal("no-context")]]
    assert ask(broker, uid=OTHER).outcomes == []


def register(broker: Router, *uids: int) -> list[Association]:
    return [broker.helo(uid, uid, uid, Link(), 0.0) for uid in uids]


def test_daemons_per_person_are_limited_without_limiting_other_people() -> None:
    broker = Router(SERVICES, lambda *_, **__: None, random_u32=lambda: 0)
    broker.person_of = lambda uid: UID if uid >= 100_000 else uid
    broker.limits = Limits(daemons=100, daemons_per_person=3)
    (mine, *_) = register(broker, UID, 100_000, 100_001)
    assert broker.refuses(100_002) == "too-many-daemons"
    assert broker.refuses(100_001) == "", "it would replace its daemon"
    assert broker.refuses(OTHER) == broker.refuses(0) == ""
    broker.gone(mine)
    assert broker.refuses(100_002) == ""


def test_daemons_are_limited_in_total_except_roots() -> None:
    broker = Router(SERVICES, lambda *_, **__: None, random_u32=lambda: 0)
    broker.limits = Limits(daemons=2, daemons_per_person=16)
    register(broker, UID, OTHER)
    assert broker.refuses(OTHER + 1) == "too-many-daemons"
    assert broker.refuses(0) == ""


def test_counters_of_uids_without_a_daemon_are_folded_and_none_is_lost() -> None:
    broker = Router(SERVICES, lambda *_, **__: None, random_u32=lambda: 0)
    register(broker, UID)
    broker.ask(UID, "short", WHO, b"x", Origin(), 0.0, 0.5)
    broker.expire(1.0)
    for uid in range(100_000, 105_000):
        broker.ask(uid, "short", WHO, b"", Origin(), 0.0)
    assert len(broker.outcomes) <= 1025
    assert UID in broker.outcomes
    assert broker.status(0.0)["outcomes"] == {"short": {"timed-out": 1, "no-daemon": 5000}}

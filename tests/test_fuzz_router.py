"""The broker's core as a state machine: by hypothesis, and with seeded bugs, each of which must be noticed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from fuzz import router
from fuzz.router import HOWS, NAMES, PATIENCES, SERVICES, STATES, UIDS, WAITS, World
from upcall.core.contexts import Context, Contexts
from upcall.core.registry import Registry
from upcall.core.router import Router


class AnyWorld(RuleBasedStateMachine):
    """The same steps as the fuzzer's, chosen and shrunk by hypothesis."""

    uids = st.sampled_from(UIDS)

    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    @rule(uid=uids, state=st.sampled_from(STATES), same_process=st.booleans())
    def helo(self, uid: int, state: str, same_process: bool) -> None:
        self.world.helo(uid, state, same_process)

    @rule(uid=uids, name=st.sampled_from(NAMES), patience=st.sampled_from(PATIENCES))
    def ask(self, uid: int, name: str, patience: float) -> None:
        self.world.ask(uid, name, patience)

    @rule(uid=uids)
    def notice(self, uid: int) -> None:
        self.world.notice(uid)

    @precondition(lambda self: self.world.sent)
    @rule(data=st.data(), how=st.sampled_from(HOWS), own=st.sampled_from([True, True, False]), cut=st.integers(0, 40))
    def answer(self, data: st.DataObject, how: str, own: bool, cut: int) -> None:
        sent = data.draw(st.sampled_from(self.world.sent))
        link = sent.link if own else data.draw(st.sampled_from(self.world.links))
        self.world.answer(sent, link, how, cut)

    @precondition(lambda self: self.world.links)
    @rule(data=st.data(), what=st.sampled_from(["quit", "gone", "well", "full", "dead"]))
    def link_changes(self, data: st.DataObject, what: str) -> None:
        link = data.draw(st.sampled_from(self.world.links))
        if what == "quit":
            self.world.quit(link)
        elif what == "gone":
            self.world.gone(link)
        elif link.state != "dead":
            link.state = what

    @rule(uid=uids, can_start=st.booleans())
    def starting(self, uid: int, can_start: bool) -> None:
        self.world.can_start = can_start
        self.world.give_up(uid)

    @rule(seconds=st.sampled_from(WAITS))
    def time_passes(self, seconds: float) -> None:
        self.world.wait(seconds)

    def teardown(self) -> None:
        self.world.close()


AnyWorld.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestAnyWorld = AnyWorld.TestCase


Patch = Callable[[pytest.MonkeyPatch], None]


def _instead(owner: type, name: str, made: Callable[..., Any]) -> Patch:
    """`made(original, self, *arguments)` in the place of a public method."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda self, *a, **k: made(original, self, *a, **k))

    return patch


def _pending(contexts: Contexts, index: int) -> Context | None:
    return next((one for one in contexts.allocated if one.index == index), None)


def _match_without(field: str) -> Callable[..., Any]:
    def match(original: Any, self: Contexts, index: int, seq: int, uid: int, pid: int) -> Context:
        context = _pending(self, index)
        if context is not None and field == "sequence":
            seq = context.counter
        if field == "index":
            index = next((one.index for one in self.allocated if one.counter == seq), index)
        found: Context = original(self, index, seq, uid, pid)
        return found

    return match


def _first_sequence(original: Any, self: Contexts, context: Context, pid: int) -> int:
    original(self, context, pid)
    context.counter = 1
    return 1


def _anybody(original: Any, self: Registry, uid: int) -> Any:
    return original(self, uid) or next(iter(self), None)


def _keeps(original: Any, self: Router, *arguments: Any) -> None:
    """Does nothing."""


def _late(original: Any, self: Router, now: float) -> None:
    original(self, now - 0.1)


def _twice(original: Any, self: Router, *arguments: Any) -> Any:
    contexts = [self.contexts_of(uid) for uid in UIDS]
    origins = {one: one.origin for held in contexts if held is not None for one in held.allocated}
    found = original(self, *arguments)
    for context, origin in origins.items():
        if origin is not None and context.origin is not origin and getattr(origin, "outcome", None) is not None:
            origin.settle(origin.outcome)  # type: ignore[attr-defined]
    return found


def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    careless = {name: service._replace(check=lambda asked, answer: None) for name, service in SERVICES.items()}
    monkeypatch.setattr(router, "SERVICES", careless)


def _tells_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upcall.core.router._may_know_why", lambda association, context: True)


def _sleeps(original: Any, self: Router) -> float:
    return math.inf


# None ignores uid or pid: a daemon's successor is sent everything anew under new sequences, so that these two checks
# are a second line, which tests/test_contexts.py tests by itself.
MUTANTS: dict[str, Patch] = {
    "match-ignores-the-sequence": _instead(Contexts, "match", _match_without("sequence")),
    "match-finds-by-sequence-alone": _instead(Contexts, "match", _match_without("index")),
    "sequences-are-reused": _instead(Contexts, "send", _first_sequence),
    "another-uid's-daemon-is-asked": _instead(Registry, "get", _anybody),
    "answers-are-not-checked": _unchecked,
    "everybody-is-told-why": _tells_why,
    "an-answer-settles-twice": _instead(Router, "answered", _twice),
    "deadlines-are-kept-late": _instead(Router, "expire", _late),
    "the-loop-is-not-woken": _instead(Router, "next_wake", _sleeps),
    "a-dead-daemon-keeps-its-requests": _instead(Router, "refuse_all", _keeps),
    "parked-requests-are-forgotten": _instead(Router, "given_up", _keeps),
    "an-old-daemon-stays": _instead(Registry, "helo", lambda original, self, association: None),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_each_seeded_bug_breaks_an_invariant(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[mutant](monkeypatch)
    chance = random.Random(10)
    with pytest.raises((AssertionError, KeyError, ValueError)):
        for _ in range(3000):
            router.play(chance.randbytes(4 * chance.randrange(5, 60)))


def test_without_a_seeded_bug_no_invariant_breaks() -> None:
    chance = random.Random(10)
    for _ in range(300):
        router.play(chance.randbytes(4 * chance.randrange(5, 60)))

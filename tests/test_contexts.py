"""Message contexts: four conditions on a reply, and invariants under any order of events."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from upcall.core import contexts as module
from upcall.core.contexts import Context, Contexts, Exhausted, NoContext, Rejected, State

UID = 1000


def one_pending(start: int = 0) -> tuple[Contexts, Context, int]:
    contexts = Contexts(UID, {"a": 2, "b": 1}, start)
    context = contexts.acquire("a")
    return contexts, context, contexts.send(context, 7)


def test_a_matching_reply_is_accepted_once() -> None:
    contexts, context, seq = one_pending()
    assert contexts.match(context.index, seq, UID, 7) is context
    assert context.state is State.DONE
    with pytest.raises(Rejected) as caught:
        contexts.match(context.index, seq, UID, 7)
    assert caught.value.on == "state"


@pytest.mark.parametrize(
    ("index", "seq", "uid", "pid", "on"),
    [
        (3, 1, UID, 7, "index"),
        (-1, 1, UID, 7, "index"),
        (1 << 31, 1, UID, 7, "index"),
        (1, 1, UID, 7, "state"),
        (0, 2, UID, 7, "sequence"),
        (0, 0, UID, 7, "sequence"),
        (0, 1, 0, 7, "uid"),
        (0, 1, UID, 8, "pid"),
    ],
)
def test_a_reply_with_one_wrong_field_is_rejected_and_the_right_one_accepted(
    index: int, seq: int, uid: int, pid: int, on: str
) -> None:
    contexts, context, right = one_pending()
    with pytest.raises(Rejected) as caught:
        contexts.match(index, seq, uid, pid)
    assert (caught.value.on, dict(contexts.rejected)) == (on, {on: 1})
    assert contexts.match(0, right, UID, 7) is context  # the right one works afterwards


def test_a_reply_to_a_context_that_was_not_sent_is_rejected() -> None:
    contexts = Contexts(UID, {"a": 1})
    context = contexts.acquire("a")
    with pytest.raises(Rejected, match="state"):
        contexts.match(context.index, 0, UID, 0)


def test_sending_again_voids_the_earlier_sequence_number() -> None:
    contexts, context, first = one_pending()
    second = contexts.send(context, 8)
    for seq, pid in ((first, 7), (first, 8), (second, 7)):
        with pytest.raises(Rejected):
            contexts.match(context.index, seq, UID, pid)
    assert contexts.match(context.index, second, UID, 8) is context


def test_one_service_cannot_starve_another() -> None:
    contexts = Contexts(UID, {"a": 2, "b": 1})
    contexts.acquire("a")
    contexts.acquire("a")
    with pytest.raises(NoContext):
        contexts.acquire("a")
    assert contexts.acquire("b").service == "b"
    with pytest.raises(KeyError):
        contexts.acquire("c")


def test_a_freed_context_is_wiped_and_cannot_be_freed_again() -> None:
    contexts, context, _ = one_pending()
    context.body = b"secret"
    contexts.free(context)
    assert (context.body, context.origin, context.counter, context.service) == (b"", None, 0, "")
    with pytest.raises(ValueError, match="not in use"):
        contexts.free(context)
    assert "secret" not in repr(context)


def test_each_sequence_number_is_used_once_and_then_sending_is_refused() -> None:
    contexts = Contexts(UID, {"a": 1}, start=5)
    context = contexts.acquire("a")
    contexts._used = module.COUNTERS - 2
    assert [contexts.send(context, 7) for _ in range(2)] == [4, 5]  # modulo 2^32, back at where it began
    with pytest.raises(Exhausted):
        contexts.send(context, 7)
    assert contexts.match(context.index, 5, UID, 7) is context


def test_sequence_numbers_wrap_and_are_not_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COUNTERS", 8)
    contexts = Contexts(UID, {"a": 1}, start=6)
    context = contexts.acquire("a")
    assert sorted(contexts.send(context, 7) for _ in range(8)) == list(range(8))
    with pytest.raises(Exhausted):
        contexts.send(context, 7)


def test_contexts_expire_once_in_order_of_their_deadlines() -> None:
    contexts = Contexts(UID, {"a": 3})
    assert contexts.next_deadline() is None
    first, second, unsent = (contexts.acquire("a") for _ in range(3))
    for context, deadline in ((first, 10.0), (second, 5.0), (unsent, 1.0)):
        context.deadline = deadline
    seq = contexts.send(first, 7)
    contexts.send(second, 7)
    assert contexts.next_deadline() == 5.0
    assert contexts.expired(4.9) == []
    assert contexts.expired(5.0) == [second]
    assert contexts.expired(5.0) == []
    assert contexts.next_deadline() == 10.0
    assert contexts.match(first.index, seq, UID, 7) is first


class AnyOrder(RuleBasedStateMachine):
    """Whatever is done in whatever order: nothing leaks, no number comes twice, a reply fits at most once."""

    contexts: Contexts

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()
        self.numbers: dict[int, tuple[int, int]] = {}  # index -> (seq, pid) that fits now
        self.deadlines: dict[int, float] = {}
        self.rejected = 0
        self.acquired: set[int] = set()

    held = Bundle("held")
    pids = st.integers(1, 3)

    @initialize(start=st.sampled_from([0, 1, (1 << 32) - 3, (1 << 32) - 1, 1 << 32]))
    def begin(self, start: int) -> None:
        self.contexts = Contexts(UID, {"a": 3, "b": 2}, start)

    @rule(target=held, service=st.sampled_from(["a", "b"]))
    def acquire(self, service: str) -> Context | None:
        share = {"a": range(3), "b": range(3, 5)}[service]
        full = all(index in self.acquired for index in share)
        try:
            context = self.contexts.acquire(service)
        except NoContext:
            assert full
            return None
        assert not full
        assert context.index in share
        assert context.index not in self.acquired
        self.acquired.add(context.index)
        return context

    @rule(context=held, pid=pids, deadline=st.floats(0, 100))
    def send(self, context: Context | None, pid: int, deadline: float) -> None:
        if context is None or context.index not in self.acquired or context.state is State.DONE:
            return
        context.deadline = self.deadlines[context.index] = deadline
        seq = self.contexts.send(context, pid)
        assert seq not in self.seen
        assert 0 <= seq < 1 << 32
        self.seen.add(seq)
        self.numbers[context.index] = (seq, pid)

    @rule(
        index=st.integers(-1, 6), right=st.booleans(), by=st.integers(-2, 2), pid=pids, uid=st.sampled_from([UID, 0])
    )
    def reply(self, index: int, right: bool, by: int, pid: int, uid: int) -> None:
        seq, expected = self.numbers.get(index, (0, 0))
        if right:
            pid, uid = expected, UID
        else:
            seq = (seq + by) % (1 << 32)
        fits = index in self.numbers and (seq, pid, uid) == (*self.numbers[index], UID)
        try:
            context = self.contexts.match(index, seq, uid, pid)
        except Rejected:
            assert not fits
            self.rejected += 1
        else:
            assert fits
            assert (context.index, context.state) == (index, State.DONE)
            del self.numbers[index]

    @rule(now=st.floats(0, 100))
    def expire(self, now: float) -> None:
        late = {index for index in self.numbers if self.deadlines[index] <= now}
        assert {context.index for context in self.contexts.expired(now)} == late
        for index in late:
            del self.numbers[index]

    @rule(context=held)
    def withdraw(self, context: Context | None) -> None:
        if context is not None and context.index in self.acquired:
            self.contexts.withdraw(context)
            self.numbers.pop(context.index, None)

    @rule(context=consumes(held))
    def free(self, context: Context | None) -> None:
        if context is None:
            return
        if context.index not in self.acquired:
            with pytest.raises(ValueError, match="not in use"):
                self.contexts.free(context)
            return
        self.contexts.free(context)
        self.acquired.discard(context.index)
        self.numbers.pop(context.index, None)

    @invariant()
    def nothing_leaks(self) -> None:
        if not hasattr(self, "contexts"):
            return
        free = [index for indexes in self.contexts._fresh.values() for index in indexes]
        free += [index for indexes in self.contexts._freed.values() for index in indexes]
        allocated = [context.index for context in self.contexts.allocated]
        assert sorted(free + allocated) == list(range(len(self.contexts)))
        assert set(allocated) == self.acquired
        assert self.contexts.in_use == len(allocated) <= self.contexts.most <= 5
        assert sum(self.contexts.rejected.values()) == self.rejected
        pending = {c.index for c in self.contexts.allocated if c.state is State.PENDING}
        assert pending == set(self.numbers)
        assert self.contexts.next_deadline() == min((self.deadlines[i] for i in pending), default=None)


TestAnyOrder = AnyOrder.TestCase

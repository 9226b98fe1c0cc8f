"""What people are told about quotas, and when: the pure core, with time as an argument."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from upcall.protocols.quota.policy import MOST_STATES, Core, Key, Told
from upcall.protocols.quota.settings import Rules
from upcall.protocols.quota.warning import (
    BHARDBELOW,
    BHARDWARN,
    BSOFTBELOW,
    BSOFTLONGWARN,
    BSOFTWARN,
    ISOFTBELOW,
    NOTHING,
    Figures,
    Warned,
)

NOW = 1_800_000_000.0
DAY, HOUR = 86400, 3600
ALICE, BOB, STAFF = 5001, 5002, 60
SPACE = Key(0x700, 0, ALICE, "space")
GROUP = Key(0x700, 1, STAFF, "space")
MB = 1 << 20
LIMITS = (100 * MB, 200 * MB)  # soft, hard
RULES = Rules()


def figures(used: float, grace: float = 0) -> Figures:
    return Figures(int(used * MB), *LIMITS, int(grace))


def core(settle: float = RULES.settle) -> Core:
    return Core(RULES._replace(settle=settle))


def warn(
    core: Core, key: Key, kind: int, now: float, now_are: Figures | None, cause: int = ALICE, count: int = 1
) -> list[Told]:
    return core.warned(key, Warned(key.kind, key.id, kind, 7, 0, cause), count, now_are, now)


def events(told: list[Told]) -> list[tuple[str, tuple[int, ...]]]:
    return [(one.event, one.to) for one in told]


def look(core: Core, now: float, now_are: Figures) -> list[Told]:
    """Everything that is due, and what comes of it."""
    return [told for key in list(core.due(now, 100)) for told in core.seen(key, now_are, now)]


# --- the kernel's warnings -----------------------------------------------------------------------------------


def test_a_warning_is_told_at_once_to_the_owner_of_the_quota() -> None:
    (told,) = warn(core(), SPACE, BSOFTWARN, NOW, figures(101, NOW + 7 * DAY), cause=BOB)
    assert told == Told((ALICE,), SPACE, "over-soft", figures(101, NOW + 7 * DAY), BOB, 1, BSOFTWARN)


def test_repeats_are_folded_and_counted() -> None:
    mind = core()
    assert warn(mind, SPACE, BHARDWARN, NOW, figures(200))
    for second in range(100):
        assert not warn(mind, SPACE, BHARDWARN, NOW + second, figures(200), count=1000)
    (told,) = warn(mind, SPACE, BHARDWARN, NOW + HOUR, figures(200))
    assert (told.event, told.count) == ("over-hard", 100_001)


def test_a_worse_state_is_told_at_once_and_a_better_one_is_not() -> None:
    mind = core()
    found = []
    for kind in (BSOFTWARN, BHARDWARN, BSOFTWARN, BSOFTLONGWARN, BHARDWARN):
        found += events(warn(mind, SPACE, kind, NOW, figures(150, NOW + 9)))
    assert found == [("over-soft", (ALICE,)), ("over-hard", (ALICE,)), ("over-soft-long", (ALICE,))]


def test_a_warning_without_figures_is_told_all_the_same() -> None:
    (told,) = warn(core(), SPACE, BHARDWARN, NOW, None)
    assert told.figures == NOTHING


def test_an_unknown_warning_is_told_with_its_number() -> None:
    (told,) = warn(core(), SPACE, 42, NOW, figures(1))
    assert told.event == "kernel-42"


def test_a_below_warning_without_a_limit_is_dropped() -> None:
    mind = core()
    assert not warn(mind, SPACE, ISOFTBELOW, NOW, NOTHING)
    assert len(mind) == 0


def test_a_below_warning_without_an_earlier_warning_is_dropped() -> None:
    mind = core()
    assert not warn(mind, SPACE, BHARDBELOW, NOW, figures(150))
    assert len(mind) == 0


# --- groups and projects -------------------------------------------------------------------------------------


def test_a_groups_warning_goes_to_the_user_who_wrote_and_to_the_system() -> None:
    mind = core()
    assert events(warn(mind, GROUP, BSOFTWARN, NOW, figures(101), cause=ALICE)) == [("over-soft", (ALICE, 0))]
    assert events(warn(mind, GROUP, BSOFTWARN, NOW, figures(101), cause=BOB)) == [("over-soft", (BOB,))]
    assert events(warn(mind, GROUP, BSOFTWARN, NOW, figures(101), cause=ALICE)) == []


def test_a_groups_warning_that_root_caused_goes_to_the_system_once() -> None:
    assert events(warn(core(), GROUP, BHARDWARN, NOW, figures(200), cause=0)) == [("over-hard", (0,))]


def test_a_groups_early_warning_goes_to_the_system_only() -> None:
    assert events(core().seen(GROUP, figures(85), NOW)) == [("near", (0,))]


def test_the_all_clear_goes_to_all_who_were_told() -> None:
    mind = core(settle=10)
    warn(mind, GROUP, BSOFTWARN, NOW, figures(101), cause=ALICE)
    warn(mind, GROUP, BSOFTWARN, NOW, figures(101), cause=BOB)
    warn(mind, GROUP, BSOFTBELOW, NOW + 1, figures(10), cause=BOB)
    assert not look(mind, NOW + 11, figures(10))
    (told,) = look(mind, NOW + 21, figures(10))
    assert (told.event, set(told.to)) == ("below", {ALICE, BOB, 0})


# --- figures alone -------------------------------------------------------------------------------------------


def test_thresholds_are_told_once_each() -> None:
    mind = core()
    found = [events(mind.seen(SPACE, figures(used), NOW + used)) for used in (79, 80, 85, 84, 90, 95, 92, 99)]
    near = [("near", (ALICE,))]
    assert found == [[], near, [], [], near, [], [], []]


def test_thresholds_have_hysteresis() -> None:
    mind = core()
    told = [bool(mind.seen(SPACE, figures(used), NOW)) for used in (80, 79, 80, 75, 80, 74, 80)]
    assert told == [True, False, False, False, False, False, True]


def test_between_two_thresholds_the_higher_one_is_armed_again() -> None:
    mind = core()
    told = [bool(mind.seen(SPACE, figures(used), NOW)) for used in (95, 84, 85, 90, 89, 90)]
    assert told == [True, False, False, True, False, False]


def test_an_excess_that_the_kernel_did_not_report_is_found_in_the_figures() -> None:
    for used, event in ((101, "over-soft"), (200, "over-hard"), (250, "over-hard")):
        assert events(core().seen(SPACE, figures(used, NOW + 9), NOW)) == [(event, (ALICE,))]
    assert events(core().seen(SPACE, figures(101, NOW), NOW)) == [("over-soft-long", (ALICE,))]


def test_a_kernels_warning_of_an_excess_already_told_is_not_told_again() -> None:
    mind = core()
    mind.seen(SPACE, figures(200), NOW)
    assert not warn(mind, SPACE, BHARDWARN, NOW + 1, figures(200))


def test_staying_over_a_limit_is_told_once() -> None:
    mind = core()
    told = [mind.seen(SPACE, figures(200), NOW + 300 * n) for n in range(1000)]
    assert sum(map(len, told)) == 1


def test_usage_without_a_limit_is_never_told() -> None:
    mind = core()
    assert not mind.seen(SPACE, Figures(1 << 50, 0, 0, 0), NOW)
    assert not mind.seen(SPACE, NOTHING, NOW)
    assert len(mind) == 0


def test_a_limit_that_is_taken_away_is_an_all_clear() -> None:
    mind = core(settle=0)
    mind.seen(SPACE, figures(200), NOW)
    assert events(mind.seen(SPACE, Figures(200 * MB, 0, 0, 0), NOW + 1)) == [("below", (ALICE,))]
    assert len(mind) == 0


# --- grace ---------------------------------------------------------------------------------------------------


def told_over_time(mind: Core, grace: float, until: float) -> list[tuple[str, float]]:
    """What is told from NOW on, when everything is looked at as soon as the core asks for it."""
    found, now = [], NOW
    while now < until:
        now = max(now, mind.next_wake())
        found += [(told.event, now - NOW) for told in look(mind, now, figures(101, grace))]
    return found


def test_warnings_escalate_while_the_grace_runs_out() -> None:
    mind = core()
    until = NOW + 7 * DAY
    assert events(warn(mind, SPACE, BSOFTWARN, NOW, figures(101, until))) == [("over-soft", (ALICE,))]
    assert told_over_time(mind, until, until + HOUR) == [
        ("grace", 3.5 * DAY),
        ("grace", 6 * DAY),
        ("grace", 7 * DAY - HOUR),
        ("grace", 7 * DAY - 600),
        ("over-soft-long", 7 * DAY),
    ]


def test_a_short_grace_is_warned_of_once_before_its_end() -> None:
    mind = core()
    warn(mind, SPACE, BSOFTWARN, NOW, figures(101, NOW + 30))
    assert told_over_time(mind, NOW + 30, NOW + 60) == [("grace", 15), ("over-soft-long", 30)]


def test_stages_missed_during_sleep_are_told_as_one() -> None:
    mind = core()
    warn(mind, SPACE, BSOFTWARN, NOW, figures(101, NOW + 7 * DAY))
    assert events(mind.seen(SPACE, figures(101, NOW + 7 * DAY), NOW + 7 * DAY - 5)) == [("grace", (ALICE,))]


def test_a_grace_runs_on_at_the_hard_limit() -> None:
    mind = core()
    mind.seen(SPACE, figures(200, NOW + 60), NOW)
    assert events(mind.seen(SPACE, figures(200, NOW + 60), NOW + 31)) == [("grace", (ALICE,))]
    assert events(mind.seen(SPACE, figures(200, NOW + 60), NOW + 60)) == [("over-soft-long", (ALICE,))]


# --- all-clear -----------------------------------------------------------------------------------------------


def test_the_all_clear_is_told_after_the_settle_time() -> None:
    mind = core(settle=10)
    warn(mind, SPACE, BSOFTWARN, NOW, figures(101))
    assert not warn(mind, SPACE, BSOFTBELOW, NOW + 5, figures(50))
    assert mind.next_wake() == NOW + 15
    assert not look(mind, NOW + 15, figures(50))
    assert events(look(mind, NOW + 25, figures(50))) == [("below", (ALICE,))]
    assert len(mind) == 0
    assert warn(mind, SPACE, BSOFTWARN, NOW + 30, figures(101))


def test_usage_just_below_the_limit_is_no_all_clear() -> None:
    mind = core(settle=0)
    warn(mind, SPACE, BSOFTWARN, NOW, figures(101))
    assert not mind.seen(SPACE, figures(99), NOW + 1)
    assert not warn(mind, SPACE, BSOFTWARN, NOW + 2, figures(101))


def test_the_settle_time_starts_again_after_a_rise() -> None:
    """Near the limit again meanwhile: the time starts again."""
    mind = core(settle=10)
    warn(mind, SPACE, BSOFTWARN, NOW, figures(101))
    assert not mind.seen(SPACE, figures(50), NOW + 1)
    assert not mind.seen(SPACE, figures(99), NOW + 6)
    assert not mind.seen(SPACE, figures(50), NOW + 12)
    assert events(mind.seen(SPACE, figures(50), NOW + 22)) == [("below", (ALICE,))]


def test_oscillation_around_a_limit_is_told_once_and_never_cleared() -> None:
    mind = core(settle=10)
    found = warn(mind, SPACE, BSOFTWARN, NOW, figures(101))
    for step in range(200):
        now = NOW + step * 3
        found += warn(mind, SPACE, BSOFTBELOW, now + 1, figures(50), count=9000)
        found += look(mind, now + 1, figures(50))
        found += warn(mind, SPACE, BSOFTWARN, now + 2, figures(101), count=9000)
        found += look(mind, now + 2, figures(101))
    assert events(found) == [("over-soft", (ALICE,))]


def test_after_an_all_clear_thresholds_below_the_limit_are_not_told() -> None:
    mind = core(settle=0)
    warn(mind, SPACE, BSOFTWARN, NOW, figures(101))
    assert events(mind.seen(SPACE, figures(92), NOW + 1)) == [("below", (ALICE,))]
    assert not mind.seen(SPACE, figures(92), NOW + 2)
    assert not mind.seen(SPACE, figures(96), NOW + 3)
    assert events(mind.seen(SPACE, figures(101), NOW + 4)) == [("over-soft", (ALICE,))]


# --- bounds --------------------------------------------------------------------------------------------------


def test_the_number_of_states_is_bounded() -> None:
    mind = core()
    for number in range(MOST_STATES + 10):
        mind.seen(SPACE._replace(id=number), figures(200), NOW)
    assert len(mind) == MOST_STATES


def test_a_flood_of_warnings_does_not_fill_the_timer_queue() -> None:
    mind = core()
    for number in range(10_000):
        warn(mind, SPACE, BSOFTWARN, NOW + number / 100, figures(101, NOW + DAY))
        warn(mind, SPACE, BSOFTBELOW, NOW + number / 100, figures(50))
    assert len(mind._times) < 100


def test_due_returns_at_most_the_number_asked_for() -> None:
    mind = core()
    for number in range(1, 101):
        mind.seen(SPACE._replace(id=number), figures(85), NOW)
    assert len(list(mind.due(NOW + 31, 30))) == 30
    assert len(list(mind.due(NOW + 31, 100))) == 70
    assert not list(mind.due(NOW + 31, 100))


def test_figures_that_cannot_be_read_are_asked_for_later() -> None:
    mind = core()
    mind.seen(SPACE, figures(85), NOW)
    (key,) = mind.due(NOW + 30, 9)
    mind.later(key, NOW + 30)
    assert mind.next_wake() == NOW + 330


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["warn", "see", "due"]), st.integers(1, 11), st.integers(0, 250), st.integers(0, 90000)
        ),
        max_size=60,
    ),
    st.sampled_from([SPACE, GROUP]),
)
def test_nobody_is_told_the_same_twice_in_a_row_within_the_hour(
    steps: list[tuple[str, int, int, int]], key: Key
) -> None:
    mind, now = core(), NOW
    last: dict[int, tuple[str, float]] = {}
    for what, kind, used, passed in steps:
        now += passed / 100
        grace = NOW + DAY if used > 100 else 0
        if what == "warn":
            told = warn(mind, key, kind, now, figures(used, grace), cause=BOB)
        elif what == "see":
            told = mind.seen(key, figures(used, grace), now)
        else:
            told = look(mind, now, figures(used, grace))
        for one in told:
            assert one.event != "near" or used < 101
            for uid in one.to:
                assert uid in ((ALICE,) if key is SPACE else (BOB, 0))
                before, when = last.get(uid, ("", 0.0))
                assert before != one.event or now >= when + HOUR or one.event in ("near", "grace", "kernel-11")
                last[uid] = one.event, now

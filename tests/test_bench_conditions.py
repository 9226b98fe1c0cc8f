"""The benchmarks say under which conditions they measured, and give no verdict where these do not allow one."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count

import pytest

from bench.conditions import MOST_FOREIGN, Series, Usage, Watch, built, doubt, drift, foreign_share, spread, usage
from bench.rows import Row, by_turns, compared, show

STEADY = [100.0, 101.0, 102.0, 103.0, 104.0]
UNSTEADY = [80.0, 90.0, 100.0, 110.0, 120.0]


# --- spread and verdicts -------------------------------------------------------------------------------------


def test_the_spread_is_that_of_the_middle_half() -> None:
    assert spread(STEADY) == pytest.approx(2 / 102)
    assert spread([*STEADY[:-1], 1000.0]) == pytest.approx(2 / 102)


def test_the_spread_of_two_or_three_figures_is_that_of_all() -> None:
    assert spread([90.0, 100.0, 120.0]) == pytest.approx(0.3)
    assert spread([90.0, 110.0]) == pytest.approx(0.2)


def test_a_single_figure_and_a_median_of_zero_have_no_spread() -> None:
    assert spread([]) is spread([1.0]) is spread([0.0, 0.0, 0.0]) is None


@pytest.mark.parametrize(("ours", "met"), [(210.0, True), (190.0, False)])
def test_a_goal_is_met_or_missed_where_the_peer_is_steady(ours: float, met: bool) -> None:
    row = compared("g", "n", "/s", [ours] * 5, STEADY, "C", at_least=2 * 100 / 102)
    assert (row.met, row.unsure) == (met, "")
    assert row.spread == pytest.approx(2 / 102)


@pytest.mark.parametrize("ours", [1.0, 1e6])
def test_there_is_no_verdict_where_the_peers_own_figures_spread_by_more_than_a_tenth(ours: float) -> None:
    row = compared("g", "n", "/s", [ours] * 5, UNSTEADY, "C", at_least=2)
    assert row.met is None
    assert row.unsure == "the peer's own figures spread by 20%"


def test_our_own_spread_does_not_matter() -> None:
    assert compared("g", "n", "/s", UNSTEADY, STEADY, "C", at_most=2).met is True


def test_a_row_without_a_goal_is_not_unsure() -> None:
    row = compared("g", "n", "/s", STEADY, UNSTEADY, "C")
    assert (row.met, row.unsure, row.goal) == (None, "", "")
    assert row.spread == pytest.approx(0.2)


@pytest.mark.parametrize("whose", ["ours", "peer"])
def test_there_is_no_verdict_where_others_disturbed_more_than_a_quarter_of_the_samples(whose: str) -> None:
    disturbed = Series([1.0] * 8, [0.2, 0.4, 0.3] + [0.0] * 5)
    calm = Series([1.0] * 8, [MOST_FOREIGN] * 8)
    ours, peer = (disturbed, calm) if whose == "ours" else (calm, disturbed)
    assert doubt(ours, peer) == "others used up to 40% of the processors"
    row = compared("g", "n", "/s", ours, peer, "C", at_least=1)
    assert row.met is None


def test_a_quarter_of_disturbed_samples_is_allowed() -> None:
    assert doubt(Series([1.0] * 8, [0.9, 0.9] + [0.0] * 6), [1.0] * 8) == ""


def test_what_is_derived_from_samples_keeps_how_much_others_disturbed() -> None:
    derived = Series([(1.0, 2.0), (3.0, 4.0)], [0.1, 0.2]).map(lambda sample: sample[1])
    assert (list(derived), derived.shares) == ([2.0, 4.0], [0.1, 0.2])


def test_the_table_says_unsure_and_the_spread(capsys: pytest.CaptureFixture[str]) -> None:
    show([compared("g", "n", "/s", [1.0] * 5, UNSTEADY, "C", at_least=2)])
    said = capsys.readouterr().out
    assert "unsure: the peer's own figures spread by 20%" in said
    assert "the peers' own figures spread by 20% (median of 1 rows; 1 above 10%)" in said
    assert "NOT MET" not in said


def test_the_table_gives_verdicts_where_the_peer_is_steady(capsys: pytest.CaptureFixture[str]) -> None:
    show([compared("g", name, "/s", [1.0] * 5, [1.0] * 5, "C", at_least=goal) for name, goal in (("a", 1), ("b", 2))])
    a, b = capsys.readouterr().out.splitlines()[-2:]
    assert a.endswith("  met")
    assert b.endswith("NOT MET")


def test_the_drift_is_the_median_of_the_spreads_that_are_known() -> None:
    assert "4% (median of 3 rows; 1 above 10%)" in drift([0.02, None, 0.04, 0.5])
    assert "not known" in drift([None])


# --- other processes -----------------------------------------------------------------------------------------


def test_the_share_of_others_is_what_is_neither_idle_nor_ours() -> None:
    # Ten seconds of two processors: 12 idle, 5 ours, so 3 of others, less the clock's resolution.
    share = foreign_share(Usage(0.0, 100.0, 50.0), Usage(10.0, 112.0, 55.0), 2)
    assert share == pytest.approx(3 / 20, abs=0.002)


def test_a_share_is_never_negative_nor_above_all() -> None:
    assert foreign_share(Usage(0.0, 0.0, 0.0), Usage(1.0, 1.0, 5.0), 2) == 0.0
    assert foreign_share(Usage(0.0, 0.0, 0.0), Usage(1.0, -9.0, 0.0), 2) == 1.0
    assert foreign_share(Usage(1.0, 0.0, 0.0), Usage(1.0, 0.0, 0.0), 2) == 0.0


def test_the_processor_time_of_children_counts_as_ours_also_when_they_have_ended() -> None:
    before = usage()
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    with subprocess.Popen([sys.executable, "-c", burn + "\ninput()"], stdin=subprocess.PIPE) as child:
        while (now := usage()).ours - before.ours < 0.25:
            assert child.poll() is None
        assert child.stdin is not None
        child.stdin.write(b"\n")
    ended = usage()
    assert ended.ours - before.ours >= 0.25
    assert ended.ours >= now.ours - 0.05  # in ticks of a hundredth once it has ended
    assert ended.at > before.at
    assert ended.idle >= before.idle


class Machine:
    """Two processors and a clock: `others` says how busy others are during each period."""

    def __init__(self, others: Iterator[float]) -> None:
        self._others = others
        self.at = self.idle = 0.0
        self.slept = 0

    def usage(self) -> Usage:
        return Usage(self.at, self.idle, 0.0)

    def spend(self, seconds: float) -> None:
        self.at += seconds
        self.idle += 2 * seconds * (1 - next(self._others))

    def sleep(self, seconds: float) -> None:
        self.slept += 1
        self.spend(seconds)

    def watch(self, patience: float) -> Watch:
        return Watch(patience, self.usage, self.sleep, 2)

    def measure(self) -> Callable[[], int]:
        numbers = count(1)

        def take() -> int:
            self.spend(1.0)
            return next(numbers)

        return take


def after(*shares: float) -> Iterator[float]:
    """Yields these shares, then 0."""
    yield from shares
    while True:
        yield 0.0


def always(share: float) -> Iterator[float]:
    while True:
        yield share


def test_a_sample_in_peace_is_taken_once() -> None:
    machine = Machine(after())
    watch = machine.watch(60)
    assert watch.take(machine.measure()) == (1, 0.0)
    assert (machine.slept, watch.samples, watch.retaken, watch.disturbed) == (0, 1, 0, 0)


def test_a_disturbed_sample_is_taken_again_once_others_are_calm() -> None:
    machine = Machine(after(0.5, 0.5, 0.5))  # the sample, and two looks
    watch = machine.watch(60)
    assert watch.take(machine.measure()) == (2, 0.0)
    assert (machine.slept, watch.samples, watch.retaken, watch.disturbed) == (3, 1, 1, 0)


def test_of_disturbed_samples_the_calmest_is_kept_and_counted() -> None:
    machine = Machine(after(0.5, 0.0, 0.2, 0.0, 0.4, 0.0, 0.3))  # samples, each followed by a calm look
    watch = machine.watch(60)
    sample, share = watch.take(machine.measure())
    assert sample == 2
    assert share == pytest.approx(0.2, abs=0.02)
    assert (watch.retaken, watch.disturbed) == (3, 1)


def test_under_constant_load_the_patience_of_all_samples_is_bounded() -> None:
    machine = Machine(always(0.5))
    watch = machine.watch(2.0)
    for _ in range(10):
        sample, share = watch.take(machine.measure())
        assert sample == 1
        assert share == pytest.approx(0.5, abs=0.02)
    assert machine.slept <= math.ceil(2.0 / 0.1) + 1
    assert (watch.samples, watch.retaken, watch.disturbed) == (10, 0, 10)
    assert str(watch) == "10 samples, 0 taken again, 10 disturbed by others all the same"


def test_rounds_alternate_and_keep_the_shares_of_their_samples() -> None:
    machine = Machine(always(0.5))
    order: list[str] = []

    def contender(name: str) -> Callable[[], float]:
        def take() -> float:
            machine.spend(1.0)
            order.append(name)
            return float(len(order))

        return take

    found = by_turns({name: contender(name) for name in "ab"}, 2, machine.watch(0.0))
    assert "".join(order) == "abba"
    assert found["a"] == [1.0, 4.0]
    assert found["a"].shares == pytest.approx([0.5, 0.5], abs=0.02)


def test_without_a_watch_samples_are_taken_as_they_come() -> None:
    found = by_turns({"a": lambda: 1.0}, 3, None)
    assert (found["a"], found["a"].shares) == ([1.0] * 3, [0.0] * 3)


# --- the interpreter -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "system", "said"),
    [
        ({"CONFIG_ARGS": "'--enable-optimizations' '--with-lto'"}, False, "by a profile and LTO (no -O)"),
        ({"CONFIG_ARGS": "", "PY_CFLAGS": "-O2", "PY_CFLAGS_NODIST": "-fprofile-use -O3"}, True, "by a profile (-O3)"),
        ({"CONFIG_ARGS": "'--prefix=/x'", "PY_CFLAGS": "-O3 -Wall"}, False, "NOT optimised by a profile (-O3;"),
        ({"CONFIG_ARGS": "", "PY_CFLAGS": "-g -O2"}, True, "the distribution's build (-O2;"),
        ({"CONFIG_ARGS": "'--with-pydebug'", "PY_CFLAGS": "-O0", "Py_DEBUG": 1}, False, "a debug build (-O0)"),
        ({}, False, "NOT optimised by a profile (no -O;"),
    ],
)  # fmt: skip
def test_how_the_interpreter_was_built_is_said(variables: dict[str, object], system: bool, said: str) -> None:
    assert said in built(variables, system)


def test_a_row_without_rounds_has_neither_spread_nor_doubt() -> None:
    assert Row("g", "n", "MB", 1.0, goal="<= 2 MB", met=True)._asdict()["unsure"] == ""

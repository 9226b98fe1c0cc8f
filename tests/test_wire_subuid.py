"""Ranges of subordinate uids: whose they are, and lines that are not to be believed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upcall.wire.subuid import Ranges, take_subuid

NAMES = {"alice": 1000, "bob": 1001}


def test_uids_of_a_range_belong_to_its_owner() -> None:
    people, skipped = take_subuid("alice:100000:65536\n1001:165536:65536\n\n# a comment\n", NAMES.get)
    assert skipped == 0
    assert [people.of(uid) for uid in (100000, 165535, 165536, 231071)] == [1000, 1000, 1001, 1001]
    assert [people.of(uid) for uid in (0, 1000, 1001, 99999, 231072, 4294967295)] == [
        0, 1000, 1001, 99999, 231072, 4294967295,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        "alice",
        "alice:1",
        "alice:x:5",
        "alice:-1:5",
        "alice:100000:0",
        "alice:0:65536",
        "alice:100000:4294967295",
        "alice:100000:99999999999999999999",
        "nobody-here:100000:5",
        "4294967295:100000:5",
        ":100000:5",
        "alice:100000:5:6",
        "alice:\u0661\u0660:5",
    ],
)
def test_a_broken_or_hostile_line_is_skipped_and_the_others_hold(line: str) -> None:
    people, skipped = take_subuid(f"{line}\nbob:200000:10\n", NAMES.get)
    assert (skipped, len(people), people.of(200005), people.of(100000)) == (1, 1, 1001, 100000)


def test_ranges_that_overlap_do_not_shadow_each_other() -> None:
    people = Ranges([(100, 200, 1), (150, 160, 2), (190, 300, 3)])
    assert [people.of(uid) for uid in (100, 155, 195, 199, 200, 299, 300)] == [1, 1, 1, 1, 3, 3, 300]


def test_an_owner_inside_anothers_range_stays_a_person() -> None:
    people = Ranges([(1000, 3000, 999), (100_000, 100_010, 1500)])
    assert (people.of(1500), people.of(1501), people.of(100_001)) == (1500, 999, 1500)


def test_a_name_is_looked_up_once() -> None:
    asked: list[str] = []

    def uid_of(name: str) -> int:
        asked.append(name)
        return 1000

    take_subuid("\n".join(f"alice:{100000 + 10 * at}:10" for at in range(50)), uid_of)
    assert asked == ["alice"]


@given(st.text())
def test_any_text_is_taken_and_root_stays_root(text: str) -> None:
    people, _ = take_subuid(text, NAMES.get)
    assert people.of(0) == 0

"""Folding, digests, what is kept for later, and what is remembered: the pure parts around the core."""

from __future__ import annotations

import json
import struct

import pytest

from upcall.core.errors import PeerError
from upcall.protocols.quota import state as memory
from upcall.protocols.quota.backlog import IN_ALL as KEPT_IN_ALL
from upcall.protocols.quota.backlog import PER_PERSON, Kept
from upcall.protocols.quota.coalescing import IN_ALL, PER_CAUSE, Folding
from upcall.protocols.quota.notice import Cause, Filesystem, QuotaNotice, Subject
from upcall.protocols.quota.policy import Core, Key, Told
from upcall.protocols.quota.rate_limit import Digests
from upcall.protocols.quota.scan import Walk
from upcall.protocols.quota.settings import Rules
from upcall.protocols.quota.warning import BHARDWARN, BSOFTWARN, Figures, Warned, pack

NOW = 1_800_000_000.0
FAMILY = 28
MB = 1 << 20
FIGURES = Figures(150 * MB, 100 * MB, 200 * MB, int(NOW) + 1000)


def message(seq: int, uid: int = 5001, warning: int = BHARDWARN, excess: int | None = None) -> bytes:
    return pack(Warned(0, uid if excess is None else excess, warning, 7, 0, uid), FAMILY, seq)


# --- folding -------------------------------------------------------------------------------------------------


def test_equal_warnings_are_one_with_a_count() -> None:
    folding = Folding(FAMILY)
    folding.add([message(n) for n in range(1000)] + [message(1000, 5002)])
    table = folding.take()
    assert sorted(table.values()) == [1, 1000]
    assert (folding.received, folding.folded, folding.sequence.lost) == (1001, 999, 0)
    assert folding.take() == {}


def test_a_gap_in_the_numbers_counts_as_lost() -> None:
    folding = Folding(FAMILY)
    folding.add([message(1), message(5), message(3)])
    assert folding.sequence.lost == 2


def test_one_user_fills_no_more_than_a_share_of_the_table() -> None:
    folding = Folding(FAMILY)
    folding.add([message(n, excess=n) for n in range(1000)] + [message(1000, 5002)])
    assert (len(folding), folding.dropped) == (PER_CAUSE + 1, 1000 - PER_CAUSE)
    folding.take()
    folding.add([message(1001)])
    assert len(folding) == 1


def test_the_table_is_bounded() -> None:
    folding = Folding(FAMILY)
    folding.add([message(n, uid=n) for n in range(IN_ALL + 5)])
    assert (len(folding), folding.dropped) == (IN_ALL, 5)


def test_several_and_longer_messages_in_a_datagram_are_taken() -> None:
    folding = Folding(FAMILY)
    longer = message(3) + struct.pack("=HHI", 8, 99, 1)
    longer = struct.pack("=I", len(longer)) + longer[4:]
    folding.add([message(1) + message(2), longer])
    assert (folding.received, folding.nonsense, sorted(folding.take().values())) == (3, 0, [1, 2])


def test_malformed_messages_are_counted_and_dropped() -> None:
    folding = Folding(FAMILY)
    folding.add([b"", b"x", message(1)[:70], bytes(76), pack(Warned(0, 1, 1, 1, 1, 1), FAMILY + 1, 1)])
    assert (folding.received, folding.nonsense, len(folding)) == (0, 4, 0)


# --- digests -------------------------------------------------------------------------------------------------

RULES = Rules(digest_after=3, digest_within=60)


def told(to: tuple[int, ...] = (5001,), number: int = 0) -> Told:
    return Told(to, Key(1, 0, number, "space"), "near", FIGURES, None, 1)


def test_notices_below_the_rate_limit_pass() -> None:
    digests = Digests(RULES)
    assert all(digests.pass_on(told(), NOW + 30 * n) for n in range(100))
    assert not list(digests.due(NOW + 3001))


def test_notices_above_the_rate_limit_become_one_digest() -> None:
    digests = Digests(RULES)
    passed = [digests.pass_on(told(number=n), NOW + n / 100) for n in range(1000)]
    assert [one is not None for one in passed] == [True] * 3 + [False] * 997
    assert not list(digests.due(NOW + 59.9))
    assert digests.next_wake() == pytest.approx(NOW + 60)
    (digest,) = digests.due(NOW + 60)
    assert (digest.event, digest.count, digest.key.id, digest.to) == ("digest", 997, 999, (5001,))
    assert digests.pass_on(told(), NOW + 60.01)


def test_a_lasting_flood_of_notices_becomes_few_digests() -> None:
    digests = Digests(RULES)
    out = 0
    for n in range(60_000):
        now = NOW + n / 100
        out += len(list(digests.due(now))) + (digests.pass_on(told(), now) is not None)
    assert out <= 3 * 11


def test_one_users_digest_does_not_hold_back_another_users_notice() -> None:
    digests = Digests(RULES)
    for _ in range(10):
        digests.pass_on(told(), NOW)
    passed = digests.pass_on(told((5001, 5002)), NOW)
    assert passed is not None
    assert passed.to == (5002,)


def test_users_without_recent_notices_are_forgotten() -> None:
    digests = Digests(RULES)
    for uid in range(1000):
        digests.pass_on(told((uid,)), NOW)
    assert not list(digests.due(NOW + 61))
    assert len(digests._people) == 0


# --- kept ----------------------------------------------------------------------------------------------------


def notice(number: int = 0, event: str = "near", at: int = 5, count: int = 1) -> QuotaNotice:
    return QuotaNotice(
        event, "space", Subject("user", number, "x"), Cause(), Filesystem("/m", "/dev/x", "ext4"), 1, 2, 3, None, 50,
        at, count,
    )  # fmt: skip


def test_the_latest_notice_of_a_quota_is_kept_with_the_sum_of_counts() -> None:
    kept = Kept()
    for at, event in enumerate(("near", "over-soft", "over-hard")):
        kept.put(5001, notice(event=event, at=at, count=2))
    kept.put(5001, notice(event="near", at=0, count=1))  # an old one that came back late
    kept.put(5001, notice(1))
    assert len(kept) == 2
    first, second = kept.take(5001)
    assert (first.event, first.count) == ("over-hard", 7)
    assert second == notice(1)
    assert kept.take(5001) == []
    assert len(kept) == 0


def test_kept_notices_are_bounded_per_person_and_in_all() -> None:
    kept = Kept()
    for number in range(PER_PERSON + 3):
        kept.put(5001, notice(number))
    assert (len(kept), kept.given_up) == (PER_PERSON, 3)
    for uid in range(KEPT_IN_ALL - 1):
        kept.put(10_000 + uid, notice())
    assert len(kept) == KEPT_IN_ALL
    assert len(list(kept)) == KEPT_IN_ALL
    assert len(kept.take(10_000 + KEPT_IN_ALL - 2)) == 1  # who had most has lost most
    assert len(kept.take(5001)) == 1


# --- the walk ------------------------------------------------------------------------------------------------


def test_a_walk_goes_over_everything_and_begins_again() -> None:
    walk: Walk[str] = Walk(300)
    assert walk.begins(0.0)
    walk.over = [("a", 0), ("a", 1)]
    assert walk.where() == ("a", 0, 0)
    walk.went_to(64)
    assert walk.where() == ("a", 0, 64)
    walk.went_to(-1)
    assert walk.where() == ("a", 1, 0)
    assert walk.going
    assert walk.ended == 0
    walk.went_to(-1)
    assert walk.ended == 1
    assert walk.where() is None
    assert not walk.going
    assert not walk.begins(299)
    walk.soon(100)
    assert walk.at == 102
    assert walk.begins(102)
    assert walk.at == 402


def test_a_walk_over_nothing_ends_at_once() -> None:
    walk: Walk[str] = Walk(300)
    assert walk.begins(0.0)
    assert walk.where() is None
    assert not walk.going
    assert walk.ended == 1
    assert walk.where() is None
    assert walk.ended == 1


# --- over a restart ------------------------------------------------------------------------------------------

POINTS, DEVICES = {1: "/m"}, {"/m": 9}


def remembered() -> bytes:
    core, kept = Core(Rules()), Kept()
    core.warned(Key(1, 0, 5001, "space"), Warned(0, 5001, BSOFTWARN, 0, 1, 5001), 7, FIGURES, NOW)
    core.warned(Key(1, 0, 5001, "space"), Warned(0, 5001, BSOFTWARN, 0, 1, 5001), 3, FIGURES, NOW)
    core.seen(Key(2, 0, 5002, "space"), FIGURES, NOW)  # on a filesystem that is mounted nowhere
    kept.put(5002, notice())
    return memory.dump(core, kept, POINTS)


def test_a_saved_state_is_loaded_and_nothing_is_told_again() -> None:
    core, kept = Core(Rules()), Kept()
    assert memory.load(remembered(), core, kept, DEVICES, NOW + 5) == 0
    assert kept.take(5002) == [notice()]
    key = Key(9, 0, 5001, "space")
    assert list(core.due(NOW + 5, 9)) == [key]
    assert not core.seen(key, FIGURES, NOW + 5)  # who was told is not told again
    (again,) = core.warned(key, Warned(0, 5001, BHARDWARN, 0, 9, 5001), 1, FIGURES, NOW + 6)
    assert (again.event, again.count) == ("over-hard", 4)


def test_states_of_unmounted_filesystems_are_forgotten() -> None:
    core = Core(Rules())
    assert memory.load(remembered(), core, Kept(), {}, NOW) == 0
    assert len(core) == 0


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b'{"version":2}', b"\xff", b"[" * 100_000])
def test_a_damaged_state_file_is_a_peer_error(data: bytes) -> None:
    with pytest.raises(PeerError):
        memory.load(data, Core(Rules()), Kept(), DEVICES, NOW)


def test_damaged_entries_are_skipped_and_counted() -> None:
    whole = json.loads(remembered())
    (state,) = whole["states"]
    bad = [None, [], "x", state[:-1], [*state[:4], 9, *state[5:]], [*state[:1], 5, *state[2:]], [*state[:9], [[1]]]]
    whole["states"] = [*bad, state]
    whole["kept"] = [None, [5001, "{}"], [5001, 5], ["x", whole["kept"][0][1]], *whole["kept"]]
    core, kept = Core(Rules()), Kept()
    assert memory.load(json.dumps(whole).encode(), core, kept, DEVICES, NOW) == len(bad) + 4
    assert (len(core), len(kept)) == (1, 1)


def test_states_that_are_not_a_list_are_ignored() -> None:
    assert memory.load(b'{"version":1,"states":5}', Core(Rules()), Kept(), DEVICES, NOW) == 0

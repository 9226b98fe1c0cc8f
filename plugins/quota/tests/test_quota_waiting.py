"""The queue of a sink: the newest state of each quota, tried a few times, with pauses."""

from __future__ import annotations

import math

from upcall_quota.waiting import LONGEST_PAUSE, MOST, TRIES, Item, Waiting

from upcall.protocols.quota.notice import Filesystem
from upcall.testing.notices import notice


def taken(waiting: Waiting, now: float = 0.0) -> Item:
    item = waiting.take(now)
    assert isinstance(item, Item)
    return item


def test_notices_are_taken_in_the_order_they_came() -> None:
    waiting = Waiting()
    assert waiting.take(0) == math.inf
    waiting.put(notice(1), "one")
    waiting.put(notice(2), "two")
    assert [taken(waiting).text, taken(waiting).text] == ["one", "two"]
    assert waiting.take(0) == math.inf


def test_the_newest_state_of_a_quota_replaces_the_older() -> None:
    waiting = Waiting()
    waiting.put(notice(event="over-soft"), "over")
    waiting.put(notice(resource="files"), "files are another quota")
    waiting.put(notice(filesystem=Filesystem("/srv", "/dev/vdb", "xfs")), "and so is another filesystem")
    waiting.put(notice(event="digest"), "a digest speaks for several")
    waiting.put(notice(event="below"), "below")
    assert [taken(waiting).text.split()[0] for _ in range(4)] == ["below", "files", "and", "a"]
    assert (waiting.replaced, waiting.dropped) == (1, 0)


def test_beyond_the_limit_the_oldest_notices_are_dropped() -> None:
    waiting = Waiting()
    for uid in range(MOST + 3):
        waiting.put(notice(uid), str(uid))
    assert (len(waiting), waiting.dropped) == (MOST, 3)
    assert taken(waiting).text == "3"


def test_pauses_double_up_to_a_limit_until_the_last_try() -> None:
    waiting, now = Waiting(), 0.0
    waiting.put(notice(), "text")
    pauses = []
    for count in range(1, TRIES + 1):
        item = taken(waiting, now)
        assert item.tries == count - 1
        assert waiting.failed(item, now, 0.0) is (count < TRIES)
        pause = waiting.take(now)
        assert isinstance(pause, float)
        pauses.append(pause)
        now += pause if pause < math.inf else 0
    assert pauses[:5] == [1, 2, 4, 8, 16]
    assert max(pauses[:-1]) <= LONGEST_PAUSE
    assert pauses[-1] == math.inf


def test_jitter_shortens_a_pause_by_half_at_most() -> None:
    waiting = Waiting()
    waiting.put(notice(), "text")
    waiting.failed(taken(waiting), 0.0, 1.0)
    assert waiting.take(0.0) == 0.5


def test_a_newer_notice_is_not_replaced_by_one_that_failed() -> None:
    waiting = Waiting()
    waiting.put(notice(event="over-soft"), "older")
    item = taken(waiting)
    waiting.put(notice(event="over-hard"), "newer")
    assert waiting.failed(item, 0.0, 0.0)
    assert taken(waiting, 1.0).text == "newer"
    assert waiting.replaced == 1


def test_a_sink_that_works_again_starts_the_back_off_anew() -> None:
    waiting = Waiting()
    for uid in (1, 2):
        waiting.put(notice(uid), "text")
    for _ in range(4):
        waiting.failed(taken(waiting, 1e6), 0.0, 0.0)
    waiting.put(notice(3), "text")
    waiting.told()
    assert isinstance(waiting.take(0.0), Item)
    assert waiting.failed(taken(waiting), 0.0, 0.0)
    assert waiting.take(0.0) == 1.0


def test_a_failed_notice_is_dropped_if_the_queue_is_full() -> None:
    waiting = Waiting()
    waiting.put(notice(0), "text")
    item = taken(waiting)
    for uid in range(1, MOST + 1):
        waiting.put(notice(uid), "text")
    assert not waiting.failed(item, 0.0, 0.0)
    assert waiting.dropped == 1

"""Locks: which keys are locked, by which cause, and what unlocks them."""

from __future__ import annotations

from upcall.protocols.ecryptfs.locks import COMMAND, Locks


def test_locking_one_key_refuses_only_that_key() -> None:
    locks = Locks()
    locks.lock("a")
    assert locks.refuses("a") and not locks.refuses("b")
    assert (locks.single, locks.causes, locks.times("a"), locks.times("b")) == (["a"], [], 1, 0)
    locks.unlock("a")
    assert not locks.refuses("a")


def test_locking_all_keys_refuses_unknown_keys_too() -> None:
    locks = Locks()
    locks.lock_all("suspend")
    assert locks.refuses("never seen")
    locks.unlock_all("suspend")
    assert not locks.refuses("never seen")


def test_keys_stay_locked_until_every_cause_has_ended() -> None:
    locks = Locks()
    locks.lock_all("suspend")
    locks.lock_all("screen-lock")
    locks.unlock_all("suspend")
    assert locks.refuses("a")
    locks.unlock_all("screen-lock")
    assert not locks.refuses("a")
    locks.unlock_all("logout")  # which nobody had begun


def test_the_end_of_an_event_does_not_unlock_what_a_user_locked() -> None:
    locks = Locks()
    locks.lock_all(COMMAND)
    locks.lock("a")
    locks.lock_all("suspend")
    locks.unlock_all("suspend")
    assert locks.refuses("a") and locks.refuses("b")
    locks.unlock_all()
    assert not locks.refuses("a") and not locks.refuses("b")


def test_a_user_unlocks_one_key_whatever_had_locked_it() -> None:
    locks = Locks()
    locks.lock_all(COMMAND)
    locks.lock_all("screen-lock")
    locks.unlock("a")
    assert not locks.refuses("a") and locks.refuses("b")
    locks.lock_all("screen-lock")  # anew
    assert locks.refuses("a")
    locks.unlock_all("screen-lock")
    assert not locks.refuses("a") and locks.refuses("b")


def test_the_number_of_locks_of_a_key_is_counted() -> None:
    """A thread that opens a key compares it: the keys may have been locked and unlocked meanwhile."""
    locks = Locks()
    locks.lock_all("suspend")
    locks.unlock_all("suspend")
    assert locks.times("a") == 1
    locks.lock("a")
    locks.unlock("a")
    assert (locks.times("a"), locks.times("b")) == (2, 1)

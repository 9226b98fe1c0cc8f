"""What is locked, for what, and what ends it."""

from __future__ import annotations

from upcall.protocols.ecryptfs.locks import COMMAND, Locks


def test_one_key() -> None:
    locks = Locks()
    locks.lock("a")
    assert locks.refuses("a") and not locks.refuses("b")
    assert (locks.single, locks.causes, locks.times) == (["a"], [], 0)
    locks.unlock("a")
    assert not locks.refuses("a")


def test_all_keys_those_too_that_nobody_knows_yet() -> None:
    locks = Locks()
    locks.lock_all("suspend")
    assert locks.refuses("never seen")
    locks.unlock_all("suspend")
    assert not locks.refuses("never seen")


def test_every_cause_has_to_end() -> None:
    locks = Locks()
    locks.lock_all("suspend")
    locks.lock_all("screen-lock")
    locks.unlock_all("suspend")
    assert locks.refuses("a")
    locks.unlock_all("screen-lock")
    assert not locks.refuses("a")
    locks.unlock_all("logout")  # which nobody had begun


def test_no_event_ends_what_a_person_has_locked() -> None:
    locks = Locks()
    locks.lock_all(COMMAND)
    locks.lock("a")
    locks.lock_all("suspend")
    locks.unlock_all("suspend")
    assert locks.refuses("a") and locks.refuses("b")
    locks.unlock_all()
    assert not locks.refuses("a") and not locks.refuses("b")


def test_a_person_unlocks_one_whatever_it_was_locked_for() -> None:
    locks = Locks()
    locks.lock_all(COMMAND)
    locks.lock_all("screen-lock")
    locks.unlock("a")
    assert not locks.refuses("a") and locks.refuses("b")
    locks.lock_all("screen-lock")  # anew
    assert locks.refuses("a")
    locks.unlock_all("screen-lock")
    assert not locks.refuses("a") and locks.refuses("b")


def test_how_often_is_counted() -> None:
    """By which who was opening a key sees that all were locked meanwhile, even if they are no more."""
    locks = Locks()
    locks.lock_all("suspend")
    locks.unlock_all("suspend")
    assert locks.times == 1

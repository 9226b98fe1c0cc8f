"""A token's PIN: which request may try it, how often, and for how long it is kept."""

from __future__ import annotations

import pytest

from upcall.daemon.prompting.pins import SHARED, TRIAL, UNTRIED, Pin

A, B = 1, 2


def typed(pin: Pin, word: bytes = b"1234", now: float = 0.0) -> bytearray:
    buffer = bytearray(word)
    pin.put(buffer, now)
    return buffer


@pytest.fixture
def pin() -> Pin:
    made = Pin(2, 900.0)
    typed(made)
    return made


def test_the_buffer_of_a_typed_pin_is_wiped() -> None:
    assert typed(Pin(2, 1)) == bytes(4)


def test_one_request_at_a_time_tries_an_untried_pin(pin: Pin) -> None:
    assert pin.take(A, 0) == bytearray(b"1234")
    assert pin.take(B, 1) is None
    pin.verdict(A, True, 1, False)
    assert pin.take(B, 2) == bytearray(b"1234")
    assert pin.take(A, 2) is None  # known to be good, it may have been changed elsewhere since


def test_a_pin_is_kept_from_its_first_good_verdict_on(pin: Pin) -> None:
    pin.take(A, 0)
    pin.verdict(A, True, 10, False)
    assert pin.due == 910
    pin.take(A, 500)
    pin.verdict(A, True, 501, False)
    assert pin.due == 910
    assert pin.take(A, 910) is None
    assert pin.due is None


def test_an_untried_pin_is_forgotten(pin: Pin) -> None:
    assert pin.due == UNTRIED
    assert pin.take(A, UNTRIED) is None


def test_wrong_pins_use_up_the_tries_until_a_reset(pin: Pin) -> None:
    pin.take(A, 0)
    pin.verdict(A, False, 1, True)
    assert pin.take(B, 1) is None
    assert (pin.left, pin.worn_out) == (1, False)
    typed(pin)
    pin.take(B, 2)
    pin.verdict(B, False, 2, False)
    assert (pin.left, pin.worn_out, pin.failures) == (0, True, 2)
    pin.reset()
    assert (pin.left, pin.worn_out, pin.failures) == (2, False, 2)  # the token has not forgotten
    typed(pin)
    pin.take(A, 3)
    pin.verdict(A, True, 3, False)
    assert (pin.left, pin.failures) == (2, 0)


def test_a_try_without_a_verdict_counts_as_wrong(pin: Pin) -> None:
    pin.take(A, 0)
    pin.ended(B)
    assert pin.failures == 0
    pin.ended(A)
    assert pin.failures == 1
    assert pin.take(B, 0) is None
    typed(pin)
    pin.take(A, 0)
    assert pin.take(A, 0) is None  # the same once more, without a word on the first
    assert pin.worn_out


def test_a_pin_known_to_be_good_needs_no_second_verdict(pin: Pin) -> None:
    pin.take(A, 0)
    pin.verdict(A, True, 0, False)
    pin.take(A, 1)
    pin.ended(A)
    assert pin.failures == 0
    assert pin.take(B, 1) == bytearray(b"1234")


@pytest.mark.parametrize(("good", "failures"), [(False, 1), (True, 0)])
def test_a_late_verdict_corrects_the_count_of_failures(pin: Pin, good: bool, failures: int) -> None:
    pin.take(A, 0)
    assert pin.take(B, TRIAL) is None
    assert pin.failures == 1
    pin.verdict(A, good, TRIAL + 1, False)
    assert pin.failures == failures


def test_a_pin_that_is_not_kept_is_shared_with_waiting_requests_only() -> None:
    pin = Pin(2, 0)
    typed(pin)
    pin.take(A, 0)
    pin.verdict(A, True, 0, False)
    assert pin.due is None
    typed(pin)
    pin.take(A, 0)
    pin.verdict(A, True, 0, True)  # others wait for it
    assert pin.take(B, 1) == bytearray(b"1234")
    pin.verdict(B, True, 1, False)
    assert pin.take(A, SHARED) is None


def test_a_verdict_on_a_forgotten_pin_does_not_count_for_the_next(pin: Pin) -> None:
    pin.take(A, 0)
    pin.forget()
    typed(pin, b"5678", 1)
    pin.verdict(A, True, 1, False)  # says nothing about the new one
    assert pin.due == 1 + UNTRIED
    assert pin.take(B, 2) == bytearray(b"5678")


def test_a_pin_is_idle_once_it_is_forgotten(pin: Pin) -> None:
    assert not pin.idle
    pin.forget()
    assert pin.idle

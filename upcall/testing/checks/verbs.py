"""Checks wrap and unwrap: all sizes, malformed input, several callers at once."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from upcall.keymodule import MAX_KEY, MAX_WRAPPED, KeyHandle
from upcall.testing.processes import in_child
from upcall.testing.subject import (
    CLEAN,
    FAILED,
    Check,
    ContractBroken,
    Subject,
    described,
    expect,
    failure,
    refused,
    wrapped_by,
)

SIZES = range(1, MAX_KEY + 1)
TIMES = 20  # wraps in each of two threads
_WINDOW = 8  # bytes; a match by chance has a probability of about 2^-50
_SAME = b"0123456789abcdef"


def keys_of_every_size_come_back(subject: Subject) -> None:
    key = subject.open()
    for size in SIZES:
        clear = os.urandom(size)
        wrapped = wrapped_by(key, clear)
        expect(len(wrapped) >= size, f"wrap made {len(wrapped)} bytes of {size}: something is missing")
        back: Any = key.unwrap(wrapped)
        expect(isinstance(back, bytes), f"unwrap gave a {type(back).__name__} for a key of {size} bytes, not bytes")
        expect(back == clear, f"unwrap gave another key ({len(back)} bytes) than was wrapped ({size} bytes)")


def the_longest_key_fits_the_header(subject: Subject) -> None:
    key = subject.open()
    for size in (MAX_KEY, MAX_KEY - 1, 35, 19):  # eCryptfs adds three bytes to keys of 64, 32 and 16
        length = len(key.wrap(os.urandom(size)) or b"")
        expect(length <= MAX_WRAPPED, f"wrap made {length} bytes of {size}: eCryptfs has room for {MAX_WRAPPED}")


def the_wrapped_key_does_not_hold_the_clear_one(subject: Subject) -> None:
    key = subject.open()
    for size in (MAX_KEY, 16):
        clear = os.urandom(size)
        wrapped = key.wrap(clear)
        for at in range(size - _WINDOW + 1):
            part = clear[at : at + _WINDOW]
            expect(part not in wrapped, f"bytes {at} to {at + _WINDOW} of the clear key stand in the wrapped one")


def the_same_key_may_be_wrapped_twice(subject: Subject) -> None:
    key = subject.open()
    first, second = key.wrap(_SAME), key.wrap(_SAME)
    expect(key.unwrap(first) == key.unwrap(second) == _SAME, "the same key, wrapped twice, did not come back twice")


def what_was_wrapped_can_be_unwrapped_after_opening_anew(subject: Subject) -> None:
    clear = b"for a new handle"
    wrapped = subject.open().wrap(clear)
    expect(subject.open().unwrap(wrapped) == clear, "opened anew, it unwraps another key")


def garbage_is_refused(subject: Subject) -> None:
    key = subject.open()
    good = key.wrap(_SAME)
    for garbage in (b"", b"x", bytes(len(good)), b"\xff" * len(good), b"\xff" * MAX_WRAPPED, bytes(8000)):
        refused(f"unwrap, of {len(garbage)} bytes of garbage", FAILED, key.unwrap, garbage)
    expect(key.unwrap(good) == _SAME, "after garbage, it no longer unwraps what it wrapped")


def a_wrapped_key_that_was_changed_is_refused(subject: Subject) -> None:
    key = subject.open()
    good = key.wrap(_SAME)
    for at in sorted({0, 1, len(good) // 4, len(good) // 2, len(good) * 3 // 4, len(good) - 2, len(good) - 1}):
        changed = good[:at] + bytes((good[at] ^ 1,)) + good[at + 1 :]
        refused(f"unwrap, with byte {at} changed", FAILED, key.unwrap, changed)
    refused("unwrap, with the last byte missing", FAILED, key.unwrap, good[:-1])
    refused("unwrap, with one more byte", FAILED, key.unwrap, good + b"x")


def sizes_out_of_range_fail_cleanly(subject: Subject) -> None:
    """Calls the verbs with sizes out of range. They must raise an error, and the key must still work."""
    key = subject.open()
    for size in (0, MAX_KEY + 1, 8000):
        failure(f"wrap, of {size} bytes", CLEAN, key.wrap, bytes(size))
    expect(key.unwrap(key.wrap(_SAME)) == _SAME, "afterwards, it no longer unwraps what it wraps")


def two_threads_at_once_do_not_disturb_each_other(subject: Subject) -> None:
    key = subject.open()
    wrong: list[str] = []
    threads = [threading.Thread(target=_work, args=(key, wrong), daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise ContractBroken(f"with two threads at once: {wrong[0]}")


def _work(key: KeyHandle, wrong: list[str]) -> None:
    try:
        for _ in range(TIMES):
            clear = os.urandom(32)
            if key.unwrap(key.wrap(clear)) != clear:
                wrong.append("another key came back")
    except BaseException as error:  # noqa: BLE001 - any exception fails the check
        wrong.append(described(error))


def a_forked_process_does_not_repeat_random_numbers(subject: Subject) -> None:
    """Wraps in a process and in its fork, with one open key. The results must differ if the module is randomised."""
    key, clear = subject.open(), os.urandom(16)
    theirs = bytes.fromhex(in_child(lambda: key.wrap(clear).hex()))
    ours, again = key.wrap(clear), key.wrap(clear)
    expect(key.unwrap(theirs) == clear, "what it wrapped in a forked process cannot be unwrapped")
    expect(theirs not in (ours, again) or ours == again, "a forked process uses the same random numbers again")


def it_answers_while_the_kernel_waits(subject: Subject) -> None:
    start = time.monotonic()
    key = subject.open()
    opened = time.monotonic()
    key.unwrap(key.wrap(_SAME))
    took, opening = time.monotonic() - start, opened - start
    text = f"a key took {took:.1f} s ({opening:.1f} s of it to open): after {subject.prompt:g} s nobody waits any more"
    expect(took < subject.prompt, text)


CHECKS: tuple[Check, ...] = (
    keys_of_every_size_come_back,
    the_longest_key_fits_the_header,
    the_wrapped_key_does_not_hold_the_clear_one,
    the_same_key_may_be_wrapped_twice,
    what_was_wrapped_can_be_unwrapped_after_opening_anew,
    garbage_is_refused,
    a_wrapped_key_that_was_changed_is_refused,
    sizes_out_of_range_fail_cleanly,
    two_threads_at_once_do_not_disturb_each_other,
    a_forked_process_does_not_repeat_random_numbers,
    it_answers_while_the_kernel_waits,
)

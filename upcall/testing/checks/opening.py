"""Checks opening: wrong blobs, signatures, passphrases and PINs, and that no secrets leak."""

from __future__ import annotations

import base64
import contextlib
import random
import time
import traceback
from collections.abc import Callable, Iterator

from upcall.core.errors import Refused
from upcall.keymodule import MAX_KEY, Closable, KeyHandle
from upcall.testing.secrets import GivenSecrets
from upcall.testing.subject import CLEAN, FAILED, Check, Made, NotApplicable, Subject, expect, failure, refused

_WRONG = b"a-wrong-passphrase"
_WRONG_PIN = b"271828"
_GARBAGE = (b"", b"\0", b"x", b"\xff" * 100, bytes(4096))
_FUZZING = 3.0  # seconds; some damaged blobs may take a module long
_DAMAGED = 200  # blobs, at most


def the_signature_of_another_key_is_refused(subject: Subject) -> None:
    signature = subject.made.signature
    near = signature[:-1] + ("0" if signature[-1] != "0" else "1")
    for other in ("0" * 16, near):
        refused(f"open, with another key's signature ({other})", FAILED, subject.open, None, other)


def a_blob_that_makes_no_sense_is_refused(subject: Subject) -> None:
    """Opens damaged blobs: any process of the user can write to the keyring. Slight damage may go unnoticed."""
    for blob in _GARBAGE:
        refused(f"open, with a blob of {len(blob)} bytes of garbage", CLEAN, subject.open, None, None, blob)
    until = time.monotonic() + _FUZZING
    for blob, how in _damaged(subject.made.blob):
        failure(f"open, with {how}", CLEAN, subject.open, None, None, blob)
        if time.monotonic() > until:
            return


def _damaged(blob: bytes) -> Iterator[tuple[bytes, str]]:
    """Yields truncated, extended and changed blobs, each with a description. The same ones in each run."""
    chance = random.Random(0)  # noqa: S311 - must be reproducible
    for _ in range(_DAMAGED):
        at = chance.randrange(len(blob) + 1)
        match chance.randrange(4):
            case 0:
                yield blob[:at], f"the blob cut after {at} bytes"
            case 1:
                yield blob[:at] + chance.randbytes(4) + blob[at:], f"4 bytes more in the blob at byte {at}"
            case 2:
                bit = chance.randrange(8)
                byte = bytes(one ^ (1 << bit) for one in blob[at : at + 1])
                yield blob[:at] + byte + blob[at + 1 :], f"bit {bit} of the blob's byte {at} changed"
            case _:
                yield chance.randbytes(at), f"a blob of {at} random bytes"


def a_wrong_passphrase_is_refused(subject: Subject) -> None:
    told = GivenSecrets(_with_passphrase(subject).swapcase(), pin=subject.made.pin or None)
    refused("open, with a wrong passphrase", FAILED, subject.open, told)


def a_passphrase_that_is_not_at_hand_is_not_its_matter(subject: Subject) -> None:
    """Opens a key whose passphrase is refused. The module must pass on that refusal, so that users see "locked"."""
    _with_passphrase(subject)
    locked = GivenSecrets(pin=subject.made.pin or None)
    error = refused("open, without the passphrase", (Refused,), subject.open, locked)
    expect(getattr(error, "reason", "") == "locked", f"it made {error!r} of Refused('locked')")


def the_secrets_that_it_was_given_are_wiped(subject: Subject) -> None:
    told = subject.made.told()
    key = subject.open(told)
    key.unwrap(key.wrap(b"0123456789abcdef"))
    if not told.given:
        raise NotApplicable("it asks for no secret")
    expect(told.wiped(), "a passphrase or PIN that it was given is still there, after it was used")


def a_wrong_pin_is_reported_and_not_tried_again(subject: Subject) -> None:
    """Opens a key with a wrong PIN. A repeated attempt could lock the token, which counts wrong PINs."""
    made = subject.made
    right = made.told()
    key = subject.open(right)
    key.unwrap(key.wrap(b"0123456789abcdef"))
    if not right.verdicts:
        raise NotApplicable("it asks for no PIN")
    expect(all(good for _, good in right.verdicts), "it said that the right PIN was wrong")
    if isinstance(key, Closable):
        key.close()  # some tokens stay logged in while a key is open
    wrong = GivenSecrets(made.passphrase or None, pin=_WRONG_PIN)
    with contextlib.suppress(*CLEAN):
        key = subject.open(wrong)
        key.unwrap(key.wrap(b"0123456789abcdef"))
    if not wrong.given:
        raise NotApplicable("it asks for no PIN once its token is logged in")
    times = sum(not good for _, good in wrong.verdicts)
    expect(times, "it was given a wrong PIN, and has not said so: Secrets.verdict")
    expect(times == 1, f"it tried a wrong PIN {times} times")


def no_secret_stands_in_what_it_shows(subject: Subject) -> None:
    """Searches error texts, tracebacks and reprs for secrets: all of these may be logged."""
    made = subject.made
    key = subject.open()
    clear = b"this-clear-key-must-never-be-seen".ljust(MAX_KEY, b"-")
    shown = [repr(key), str(key), repr(made.module)]
    shown += [_trace(call) for call in _failing(subject, key, clear)]
    secrets = {"clear key": clear, "passphrase": made.passphrase, "wrong passphrase": _WRONG}
    secrets |= {"PIN": made.pin, "wrong PIN": _WRONG_PIN}
    for what, secret in secrets.items():
        forms = {secret.decode("utf-8", "replace"), secret.hex(), base64.b64encode(secret).decode()}
        for form in forms if secret else ():
            expect(not any(form in text for text in shown), f"the {what} stands in an error's text, or in a repr")


def _failing(subject: Subject, key: KeyHandle, clear: bytes) -> Iterator[Callable[[], object]]:
    made = subject.made
    wrapped = key.wrap(clear)
    yield lambda: key.unwrap(wrapped[:-1] + bytes((wrapped[-1] ^ 1,)))
    yield lambda: key.unwrap(clear)
    yield lambda: key.wrap(clear + b"x")
    yield lambda: subject.open(signature="0" * 16)
    yield lambda: subject.open(blob=b"\xff" * 100)
    if made.passphrase:
        yield lambda: subject.open(GivenSecrets(_WRONG, pin=made.pin or None))
    if _asks_for_pin(subject, made):
        yield lambda: subject.open(GivenSecrets(made.passphrase or None, pin=_WRONG_PIN)).unwrap(wrapped)


def _asks_for_pin(subject: Subject, made: Made) -> bool:
    told = made.told()
    key = subject.open(told)
    key.unwrap(key.wrap(b"0123456789abcdef"))
    return bool(told.verdicts)


def _trace(call: Callable[[], object]) -> str:
    """Returns the traceback that a log would show of a failure; "" without one."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - all kinds are searched
        return "".join(traceback.format_exception(error))
    return ""


def _with_passphrase(subject: Subject) -> bytes:
    if not subject.made.passphrase:
        raise NotApplicable("this key has no passphrase")
    return subject.made.passphrase


CHECKS: tuple[Check, ...] = (
    the_signature_of_another_key_is_refused,
    a_blob_that_makes_no_sense_is_refused,
    a_wrong_passphrase_is_refused,
    a_passphrase_that_is_not_at_hand_is_not_its_matter,
    the_secrets_that_it_was_given_are_wiped,
    a_wrong_pin_is_reported_and_not_tried_again,
    no_secret_stands_in_what_it_shows,
)

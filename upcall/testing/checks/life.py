"""Checks an opened key whose file changes or is removed, that is closed, or is in another process."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator

from upcall.core.errors import Refused
from upcall.daemon.isolation.module import IsolatedModule
from upcall.kernel import procfs
from upcall.keymodule import Closable, KeyHandle, Watched
from upcall.testing.secrets import GivenSecrets
from upcall.testing.subject import (
    CLEAN,
    Check,
    ContractBroken,
    NotApplicable,
    Subject,
    described,
    expect,
    failure,
    refused,
)

QUICK = 0.001  # seconds for `stale`, which is called on every request
_CLEAR = b"0123456789abcdef"
_WRAPS = 50  # while another thread closes the key


def it_is_stale_once_its_file_has_changed(subject: Subject) -> None:
    file = subject.made.file
    if file is None:
        raise NotApplicable("this key is in no file")
    key = _watched(subject)
    expect(not key.stale(), "it is stale as soon as it was opened")
    new = file.with_name(file.name + ".new")
    shutil.copy2(file, new)
    new.replace(file)
    expect(key.stale(), "another file is in the place of its own, and it is not stale")
    again = _watched(subject)
    expect(not again.stale(), "opened anew, it is still stale")
    with subject.away():
        expect(again.stale(), "its file has gone, and it is not stale")


def _watched(subject: Subject) -> Watched:
    key = subject.open()
    if not isinstance(key, Watched):
        raise ContractBroken("its key is in a file, and the handle has no stale(): it would be used for ever")
    return key


def stale_is_quick(subject: Subject) -> None:
    key = subject.open()
    if not isinstance(key, Watched):
        raise NotApplicable("the handle has no stale()")
    best = min(_seconds(key) for _ in range(20))
    expect(best < QUICK, f"stale() takes {best * 1e3:.1f} ms at best, and is asked on every request")


def _seconds(key: Watched) -> float:
    start = time.perf_counter()
    key.stale()
    return time.perf_counter() - start


def without_its_token_it_fails_cleanly(subject: Subject) -> None:
    """Uses an open key while its file or token is removed. The key may work on for a while."""
    key = subject.open()
    wrapped = key.wrap(_CLEAR)
    with subject.away():
        refused("open, without the key's file or token", CLEAN, subject.open)
        failure("wrap, without the key's file or token", CLEAN, key.wrap, _CLEAR)
        failure("unwrap, without the key's file or token", CLEAN, key.unwrap, wrapped)
    expect(subject.open().unwrap(wrapped) == _CLEAR, "its file or token is there again, and it unwraps something else")


def once_closed_it_fails_cleanly(subject: Subject) -> None:
    """Uses a closed key. It may work on, but must not wrap with remains of the key."""
    key = _closable(subject)
    wrapped, after = key.wrap(_CLEAR), b""
    key.close()
    with contextlib.suppress(*CLEAN):
        after = key.wrap(_CLEAR)
    failure("unwrap, after it was closed", CLEAN, key.unwrap, wrapped)
    if after:
        expect(not _lost(subject, after), "it was closed, wrapped a key all the same, and what it wrapped is lost")


def _lost(subject: Subject, wrapped: bytes) -> bool:
    try:
        return subject.open().unwrap(wrapped) != _CLEAR
    except CLEAN:
        return True


def closing_harms_no_call_under_way(subject: Subject) -> None:
    """Closes a key during calls of another thread. These may fail, but what they have wrapped can be unwrapped."""
    key = _closable(subject)
    wrapped: list[bytes] = []
    wrong: list[str] = []
    closed, begun = threading.Event(), threading.Event()

    def work() -> None:
        try:
            while not closed.is_set() and len(wrapped) < _WRAPS:
                begun.set()
                wrapped.append(key.wrap(_CLEAR))
        except CLEAN:
            return
        except BaseException as error:  # noqa: BLE001 - any exception fails the check
            wrong.append(described(error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    begun.wait()
    key.close()
    closed.set()
    thread.join()
    if wrong:
        raise ContractBroken(f"wrap, while another thread closed the key: {wrong[0]}")
    expect(not any(_lost(subject, one) for one in wrapped[-2:]), "what it wrapped while it was closed is lost")


class _ClosableKey(KeyHandle, Closable): ...


def _closable(subject: Subject) -> _ClosableKey:
    key = subject.open()
    if not isinstance(key, Closable):
        raise NotApplicable("the handle has no close()")
    return key  # type: ignore[return-value]


def it_leaves_no_process_behind(subject: Subject) -> None:
    """Checks for child processes after opening and using a key. A module must reap its children, and must not
    fork the daemon."""
    if isinstance(subject.made.module, IsolatedModule):
        raise NotApplicable("it has a process of its own, as it should")
    before = set(procfs.children())
    key = subject.open()
    key.unwrap(key.wrap(_CLEAR))
    if isinstance(key, Closable):
        key.close()
    left = set(procfs.children()) - before
    expect(not left, f"it left {len(left)} processes behind: they have been forked, and not waited for")


def in_a_process_of_its_own_it_does_the_same(subject: Subject) -> None:
    made = subject.made
    if isinstance(made.module, IsolatedModule):
        raise NotApplicable("it is in one already")
    if not made.spec:
        raise NotApplicable("it was found by no entry point, so a process of its own would not find it either")
    inline = subject.open()
    isolated = IsolatedModule(made.module.name, made.spec)
    with contextlib.closing(isolated), Subject(made._replace(module=isolated), subject.folder) as other:
        apart = other.open()
        expect(apart.unwrap(inline.wrap(_CLEAR)) == _CLEAR, "it unwraps something else there than was wrapped here")
        expect(inline.unwrap(apart.wrap(_CLEAR)) == _CLEAR, "what it wraps there, it does not unwrap here")
        for what, here, there in zip(_WRONG, _refusals(subject, inline), _refusals(other, apart), strict=True):
            expect(here == there, f"{what}: here {here}, in a process of its own {there}")


_WRONG = ("garbage", "another key's signature", "a wrong passphrase")


def _refusals(subject: Subject, key: KeyHandle) -> Iterator[str]:
    """Yields the outcome of unwrapping each of `_WRONG`, as text."""
    told = GivenSecrets(b"wrong", pin=subject.made.pin or None)
    calls: tuple[Callable[[], object], ...] = (
        lambda: key.unwrap(b"garbage"),
        lambda: subject.open(signature="0" * 16),
        lambda: subject.open(told),
    )
    for call in calls:
        try:
            call()
        except CLEAN as error:
            yield f"Refused({error.reason})" if isinstance(error, Refused) else type(error).__name__
        else:
            yield "it is taken"


CHECKS: tuple[Check, ...] = (
    it_is_stale_once_its_file_has_changed,
    stale_is_quick,
    without_its_token_it_fails_cleanly,
    once_closed_it_fails_cleanly,
    closing_harms_no_call_under_way,
    it_leaves_no_process_behind,
    in_a_process_of_its_own_it_does_the_same,
)

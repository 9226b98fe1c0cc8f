"""Key modules and daemons that lie, fail or hang: the caller has its error at once, and no file loses its key."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator

import pytest

from tests.kernel.hostile import HostileModule, LyingDaemon, Verb
from tests.kernel.scene import (
    CONTENT,
    House,
    attempt,
    begin,
    creating,
    daemon_status,
    key_service,
    keys,
    lower_names,
    nothing_given_up,
    opening,
    outcome_counts,
    vault,
)
from upcall.core.errors import ModuleFailed
from upcall.keymodule import KeyHandle
from upcall.protocols.ecryptfs import packets as wire
from upcall.protocols.ecryptfs.packets import Reply, pack_reply, take_ask
from upcall.testing.lab.stage import Person, wait_until

SIGNATURE = keys()["rsa2048"].signature


@pytest.fixture(scope="module")
def shared() -> Iterator[House]:
    """A broker for all of them; each test brings its daemon, which replaces the one before."""
    house = House()
    try:
        house.open()
        yield house
    finally:
        house.close()


def _raise(error: BaseException) -> Verb:
    def verb(_handle: KeyHandle, _data: bytes) -> object:
        raise error

    return verb


WRAPS: dict[str, Verb] = {
    "raises": _raise(ValueError("no")),
    "raises SystemExit": _raise(SystemExit(0)),
    "says that it failed": _raise(ModuleFailed("no")),
    "gives None": lambda _handle, _key: None,
    "gives nothing": lambda _handle, _key: b"",
    "gives a text": lambda _handle, _key: "x" * 256,
    "gives too little": lambda _handle, key: key[:-1],
    "gives too much": lambda _handle, _key: bytes(513),
    "gives the key back": lambda _handle, key: key,
    "gives the key back among zeros": lambda _handle, key: key.ljust(256, b"\0"),
    "gives garbage": lambda _handle, _key: os.urandom(256),
}
UNWRAPS: dict[str, Verb] = {
    "raises": _raise(ValueError("no")),
    "raises SystemExit": _raise(SystemExit(0)),
    "says that it failed": _raise(ModuleFailed("no")),
    "gives None": lambda _handle, _wrapped: None,
    "gives nothing": lambda _handle, _wrapped: b"",
    "gives too little": lambda handle, wrapped: handle.unwrap(wrapped)[:-1],
    "gives too much": lambda handle, wrapped: handle.unwrap(wrapped).ljust(68, b"\0"),
    "gives another cipher": lambda handle, wrapped: b"\x09" + handle.unwrap(wrapped)[1:],
    "gives garbage": lambda _handle, _wrapped: os.urandom(19),
    "gives the wrapped key": lambda _handle, wrapped: wrapped,
}


@pytest.mark.parametrize("how", list(WRAPS))
def test_a_wrap_that_fails_or_lies_is_refused_and_leaves_no_file(shared: House, alice: Person, how: str) -> None:
    shared.daemon(alice, lambda: key_service(lambda: HostileModule(wrap=WRAPS[how])))
    with vault(alice, SIGNATURE) as files:
        with nothing_given_up():
            assert attempt(alice, creating(files.upper / "new")).errno == errno.EIO
        assert lower_names(files) == []  # no file whose key is lost
        shared.daemon(alice)
        assert attempt(alice, creating(files.upper / "new")).errno == 0
        files.remount()
        assert attempt(alice, opening(files.upper / "new")).value == CONTENT


@pytest.mark.parametrize("how", list(UNWRAPS))
def test_an_unwrap_that_fails_or_lies_is_refused_and_the_file_stays(shared: House, alice: Person, how: str) -> None:
    shared.daemon(alice)
    with vault(alice, SIGNATURE) as files:
        path = files.cold(1)[0]
        shared.daemon(alice, lambda: key_service(lambda: HostileModule(unwrap=UNWRAPS[how])))
        with nothing_given_up():
            assert attempt(alice, opening(path)).errno == errno.EIO
        shared.daemon(alice)
        assert attempt(alice, opening(path)).value == CONTENT


LIES = {
    "an empty answer": lambda _asked: b"",
    "a tag 67 of size 0": lambda _asked: b"\x43\0\0",
    "a tag 67 of size 1": lambda _asked: b"\x43\0\x01x",
    "a tag 67 that is too short": lambda asked: pack_reply(Reply(0x43, 0, take_ask(asked).content[:-1])),
    "a tag 67 of 513 bytes": lambda _asked: pack_reply(Reply(0x43, 0, bytes(513))),
    "a tag 67 with the key in clear": lambda asked: pack_reply(Reply(0x43, 0, take_ask(asked).content)),
    "a tag 67 with bytes behind it": lambda _asked: pack_reply(Reply(0x43, 0, bytes(256))) + b"x",
    "a tag 67 that ends early": lambda _asked: pack_reply(Reply(0x43, 0, bytes(256)))[:-1],
    "a tag 65": lambda asked: pack_reply(Reply(0x41, 0, take_ask(asked).content)),
    "what was asked": lambda asked: asked,
    "a failure": lambda _asked: b"\x43\xff",
    "a failure with bytes behind it": lambda _asked: b"\x43\xff" + bytes(30),
    "60 kilobytes": lambda _asked: bytes(60000),
    "more than the protocol has room for": lambda _asked: bytes(70000),
}


@pytest.mark.parametrize("what", list(LIES))
def test_a_daemons_malformed_answer_is_refused(shared: House, alice: Person, what: str) -> None:
    """Without the daemon's own checks, the broker's stand before the kernel."""
    shared.daemon(alice, lambda: LyingDaemon(LIES[what]))
    with vault(alice, SIGNATURE) as files:
        with nothing_given_up():
            assert attempt(alice, creating(files.upper / "new")).errno == errno.EIO
        assert lower_names(files) == []


def test_proving_all_refuses_a_module_that_goes_bad_later(shared: House, alice: Person) -> None:
    """With --prove-all every wrapped key is unwrapped before anybody sees it."""
    count = 0

    def wrap(handle: KeyHandle, key: bytes) -> object:
        nonlocal count
        count += 1
        return handle.wrap(key) if count <= 2 else os.urandom(256)

    shared.daemon(alice, lambda: key_service(lambda: HostileModule(wrap=wrap), prove_all=True))
    with vault(alice, SIGNATURE) as files:
        files.fill(2)
        assert attempt(alice, creating(files.upper / "new")).errno == errno.EIO
        assert lower_names(files) == ["file-0", "file-1"]


def test_a_module_that_hangs_times_out_and_holds_nobody_else_up(shared: House, alice: Person, bob: Person) -> None:
    """Refused when the broker's patience ends, before the kernel's does; others do not notice."""
    gate = shared.gate()

    def wrap(_handle: KeyHandle, _key: bytes) -> object:
        gate.wait()
        raise ModuleFailed("too late anyway")

    shared.daemon(alice, lambda: key_service(lambda: HostileModule(wrap=wrap)))
    shared.daemon(bob)
    before = outcome_counts().get("timed-out", 0)
    with vault(alice, SIGNATURE) as files, vault(bob, keys()["captured"].signature) as others:
        hung = begin(alice, creating(files.upper / "new"))
        for number in itertools.count():
            assert attempt(bob, creating(others.upper / f"{number}")).errno == 0
            if hung.ended:
                break
        assert hung.result().errno == errno.EIO
        assert outcome_counts()["timed-out"] == before + 1
        assert lower_names(files) == []
        gate.open()


def test_an_answer_after_the_refusal_is_dropped(shared: House, alice: Person) -> None:
    """What comes after the refusal is counted and dropped; the kernel never sees it."""
    gate = shared.gate()
    slow = [True]

    def unwrap(handle: KeyHandle, wrapped: bytes) -> object:
        if slow:
            slow.clear()
            gate.wait()
        return handle.unwrap(wrapped)

    shared.daemon(alice)
    with vault(alice, SIGNATURE) as files:
        path = files.cold(1)[0]
        shared.daemon(alice, lambda: key_service(lambda: HostileModule(unwrap=unwrap)))
        assert attempt(alice, opening(path)).errno == errno.EIO
        gate.open()
        wait_until(lambda: daemon_status(alice)["rejected"] == 1, "the late answer")
        assert "reply-rejected" in shared.log()
        assert attempt(alice, opening(path)).value == CONTENT


def test_a_wrapped_key_of_the_right_size_is_taken_unseen(shared: House, alice: Person) -> None:
    """A daemon may harm its own user: a key of the right size that nobody can unwrap is taken for one."""
    shared.daemon(alice, lambda: LyingDaemon(lambda _asked: pack_reply(Reply(wire.TAG_67, 0, os.urandom(256)))))
    with vault(alice, SIGNATURE) as files:
        assert attempt(alice, creating(files.upper / "lost")).errno == 0
        shared.daemon(alice)
        files.remount()
        assert attempt(alice, opening(files.upper / "lost")).errno == errno.EIO

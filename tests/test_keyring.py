"""The kernel's keyrings, on the kernel that we run on, as the user that we are."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from upcall.kernel import keyring
from upcall.testing.processes import in_child, until


@pytest.fixture
def name() -> Iterator[str]:
    name = os.urandom(8).hex()
    yield name
    serial = keyring.find(name)
    if serial is not None:
        keyring.unlink(serial)


def in_a_child(code: str) -> str:
    """What Python code prints in a process with a session keyring of its own that links nothing."""
    bare = "import sys; from upcall.kernel import keyring as k; k._call('join', 1, 0);"
    done = subprocess.run([sys.executable, "-c", bare + code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_key_is_added_found_read_replaced_and_unlinked(name: str) -> None:
    assert keyring.find(name) is None
    serial = keyring.add_user_key(name, b"\0first\0")
    assert keyring.find(name) == serial
    assert keyring.read(serial) == b"\0first\0"
    assert keyring.add_user_key(name, b"second, longer") == serial
    assert keyring.read(serial) == b"second, longer"
    keyring.unlink(serial)
    assert keyring.find(name) is None


def test_the_longest_payload_is_kept_and_a_longer_one_refused(name: str) -> None:
    payload = os.urandom(keyring.MAX_PAYLOAD)
    assert keyring.read(keyring.add_user_key(name, payload)) == payload
    with pytest.raises(OSError, match="add_key") as caught:
        keyring.add_user_key(name, payload + b"x")
    assert caught.value.errno == errno.EINVAL


def test_the_read_buffer_is_wiped(name: str) -> None:
    keyring.read(keyring.add_user_key(name, b"a passphrase"))
    assert not any(ctypes.string_at(keyring._scratch.address, 64))


def test_describe_tells_owner_permissions_and_name_of_a_key(name: str) -> None:
    serial = keyring.add_user_key(name, b"x")
    key = keyring.describe(serial)
    assert key == (serial, "user", os.getuid(), os.getgid(), keyring.PERMISSIONS, name)
    assert key in keyring.list_user_keyring()


def test_a_description_may_hold_semicolons() -> None:
    name = f"upcall;{os.urandom(4).hex()};x"
    serial = keyring.add_user_key(name, b"x")
    try:
        assert keyring.describe(serial).description == name
    finally:
        keyring.unlink(serial)


def test_a_nul_in_the_description_is_refused() -> None:
    with pytest.raises(ValueError, match="NUL"):
        keyring.add_user_key("a\0b", b"x")


def test_a_revoked_key_is_not_found_and_can_be_replaced(name: str) -> None:
    serial = keyring.add_user_key(name, b"x")
    keyring.revoke(serial)
    assert keyring.find(name) is None
    with pytest.raises(OSError, match="KEYCTL_READ") as caught:
        keyring.read(serial)
    assert caught.value.errno == errno.EKEYREVOKED
    assert keyring.add_user_key(name, b"y") != serial
    assert keyring.find(name) is not None


def test_an_expired_key_is_not_found(name: str) -> None:
    serial = keyring.add_user_key(name, b"x")
    keyring.set_timeout(serial, 1)
    until(lambda: keyring.find(name) is None, "the key has expired")
    keyring.unlink(serial)


def test_errors_name_the_operation() -> None:
    for call, operation in (
        (keyring.read, "KEYCTL_READ"),
        (keyring.unlink, "KEYCTL_UNLINK"),
        (keyring.revoke, "KEYCTL_REVOKE"),
        (keyring.describe, "KEYCTL_DESCRIBE"),
        (keyring.list_keyring, "KEYCTL_READ"),
    ):
        with pytest.raises(OSError, match=operation) as caught:
            call(0x7FFFFFFE)
        assert caught.value.errno == errno.ENOKEY


def test_a_user_keyring_of_many_keys_is_listed_in_full() -> None:
    names = {f"upcall-{os.urandom(8).hex()}" for _ in range(100)}
    serials = [keyring.add_user_key(name, b"x") for name in names]
    try:
        assert names <= {key.description for key in keyring.list_user_keyring()}
    finally:
        for serial in serials:
            keyring.unlink(serial)


def test_a_process_without_the_user_keyring_in_its_session_reads_the_key(name: str) -> None:
    serial = keyring.add_user_key(name, b"for all of us")
    code = f"s = k.find({name!r}); assert s == {serial}; print(k.read(s).decode())"
    assert in_a_child(code) == "for all of us"


def test_a_key_added_without_the_user_keyring_in_the_session_is_readable(name: str) -> None:
    in_a_child(f"k.add_user_key({name!r}, b'from a bare session')")
    serial = keyring.find(name)
    assert serial is not None
    assert keyring.read(serial) == b"from a bare session"


def test_a_foreign_key_with_default_permissions_needs_possession(name: str) -> None:
    """As ecryptfs-manager adds it: only possessors may read. A link in the session makes us one."""
    try:
        in_a_child(f"k._add_key(k._ADD_KEY, b'user', {name!r}.encode(), b'secret', 6, k.USER_KEYRING)")
        read = f"s = k.find({name!r}); print(k.read(s).decode())"
        with pytest.raises(AssertionError, match=r"PermissionError.*KEYCTL_READ"):
            in_a_child(read)
        assert in_a_child("k.ensure_user_keyring_linked();" + read) == "secret"
        assert in_a_child("k.join_session_and_link_user_keyring();" + read) == "secret"
    finally:
        keyring.ensure_user_keyring_linked()


def test_threads_that_read_at_once_get_their_own_payloads(name: str) -> None:
    names = [f"{name}-{number}" for number in range(4)]
    wrong: list[str] = []

    def work(mine: str) -> None:
        for _ in range(500):
            serial = keyring.find(mine)
            if serial is None or keyring.read(serial) != mine.encode() * 50:
                wrong.append(mine)

    serials = [keyring.add_user_key(each, each.encode() * 50) for each in names]
    try:
        threads = [threading.Thread(target=work, args=(each,)) for each in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        for serial in serials:
            keyring.unlink(serial)
    assert not wrong


# --- keyrings in keyrings --------------------------------------------------------------------------------------


@pytest.fixture
def inner(name: str) -> Iterator[int]:
    """A keyring in the user keyring."""
    keyring.ensure_user_keyring_linked()
    serial = keyring.add_keyring(name, keyring.USER_KEYRING)
    yield serial
    keyring.unlink(serial)


def test_a_nested_keyring_is_found_listed_and_searched(inner: int, name: str) -> None:
    assert keyring.search(keyring.USER_KEYRING, "keyring", name) == inner
    assert keyring.search(keyring.USER_KEYRING, "user", name) is None
    assert keyring.list_keyring(inner) == []
    serial = keyring.add_user_key("in it", b"x", inner)
    assert keyring.search(inner, "user", "in it") == serial
    assert keyring.list_keyring(inner) == [keyring.describe(serial)]
    assert keyring.describe(inner).permissions == keyring.PERMISSIONS


def test_moving_a_key_displaces_one_of_its_name_unless_exclusive(inner: int) -> None:
    keyring.add_user_key("one", b"old", inner)
    serial = keyring.add_user_key("one", b"new", keyring.PROCESS_KEYRING)
    with pytest.raises(FileExistsError, match="KEYCTL_MOVE"):
        keyring.move(serial, keyring.PROCESS_KEYRING, inner, exclusive=True)
    keyring.move(serial, keyring.PROCESS_KEYRING, inner)
    assert [key.serial for key in keyring.list_keyring(inner)] == [serial]
    assert keyring.search(keyring.PROCESS_KEYRING, "user", "one") is not None  # through the user keyring
    assert serial not in [key.serial for key in keyring.list_keyring(keyring.PROCESS_KEYRING)]


def test_the_persistent_keyring_is_linked_to_the_process_keyring() -> None:
    if not keyring.capabilities() & keyring.PERSISTENT_KEYRINGS:
        pytest.skip("this kernel has none")

    def linked() -> list[bool]:
        serial = keyring.link_persistent_keyring()
        return [
            keyring.describe(serial).description == f"_persistent.{os.getuid()}",
            serial == keyring.link_persistent_keyring(),
            [key.serial for key in keyring.list_keyring(keyring.PROCESS_KEYRING)] == [serial],
        ]

    assert in_child(linked) == [True] * 3


def test_a_search_in_a_key_that_is_no_keyring_is_an_error(name: str) -> None:
    serial = keyring.add_user_key(name, b"x")
    with pytest.raises(NotADirectoryError, match="KEYCTL_SEARCH"):
        keyring.search(serial, "user", name)

"""The contract of key modules, as a test class to inherit:

class TestMyModule(KeyModuleContract):
    def make(self, tmp_path: Path) -> Made:
        ...
        return Made(MyModule(), signature, blob, b"passphrase", key_file)
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import NamedTuple

import pytest

from upcall.errors import ModuleFailed, Refused
from upcall.keymodule import API, MAX_KEY, MAX_WRAPPED, Closable, KeyHandle, KeyModule, Watched
from upcall.modules import MAX_ALIAS
from upcall.testing.processes import in_child
from upcall.testing.secrets import Told

SIZES = range(1, MAX_KEY + 1)
TIMES = 20  # for each of two threads


class Made(NamedTuple):
    """A key of the module under test. `passphrase` is empty if it has none; `file` None if it is in no file."""

    module: KeyModule
    signature: str
    blob: bytes
    passphrase: bytes = b""
    file: Path | None = None


class KeyModuleContract:
    """What every key module must do. `make` gives a new key each time."""

    def make(self, tmp_path: Path) -> Made:
        raise NotImplementedError

    @pytest.fixture
    def made(self, tmp_path: Path) -> Made:
        return self.make(tmp_path)

    @pytest.fixture
    def key(self, made: Made) -> KeyHandle:
        return open_key(made)

    def test_it_has_a_name_and_a_version(self, made: Made) -> None:
        assert made.module.api == API
        assert 1 <= len(made.module.name) <= MAX_ALIAS
        assert made.module.name.isascii()
        assert made.module.name.isprintable()
        assert len(made.signature) == 16
        assert not made.signature.strip("0123456789abcdef")

    def test_keys_of_every_size_come_back(self, key: KeyHandle) -> None:
        for size in SIZES:
            clear = os.urandom(size)
            wrapped = key.wrap(clear)
            assert isinstance(wrapped, bytes)
            assert size <= len(wrapped) <= MAX_WRAPPED
            assert key.unwrap(wrapped) == clear

    def test_the_wrapped_key_does_not_hold_the_clear_one(self, key: KeyHandle) -> None:
        clear = os.urandom(MAX_KEY)
        assert clear not in key.wrap(clear)
        assert clear[:16] not in key.wrap(clear[:16])

    def test_the_same_key_may_be_wrapped_twice(self, key: KeyHandle) -> None:
        first, second = key.wrap(b"0123456789abcdef"), key.wrap(b"0123456789abcdef")
        assert key.unwrap(first) == key.unwrap(second) == b"0123456789abcdef"

    def test_what_was_wrapped_can_be_unwrapped_after_opening_anew(self, made: Made, key: KeyHandle) -> None:
        assert open_key(made).unwrap(key.wrap(b"0123456789abcdef")) == b"0123456789abcdef"

    def test_garbage_is_module_failed_and_nothing_else(self, key: KeyHandle) -> None:
        good = key.wrap(b"0123456789abcdef")
        changed = good[:-1] + bytes((good[-1] ^ 1,))
        for garbage in (
            b"",
            b"x",
            changed,
            good[:-1],
            good + b"x",
            bytes(len(good)),
            b"\xff" * MAX_WRAPPED,
            bytes(8000),
        ):
            with pytest.raises(ModuleFailed):
                key.unwrap(garbage)
        assert key.unwrap(good) == b"0123456789abcdef"  # and it still works

    def test_two_threads_at_once(self, key: KeyHandle) -> None:
        wrong: list[object] = []

        def work() -> None:
            try:
                for _ in range(TIMES):
                    clear = os.urandom(32)
                    if key.unwrap(key.wrap(clear)) != clear:
                        wrong.append("another key came back")
            except BaseException as error:  # noqa: BLE001 - whatever it is, the test fails with it
                wrong.append(error)

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        assert wrong == []

    def test_a_fork_does_not_repeat_its_parents_random_numbers(self, key: KeyHandle) -> None:
        """Of two processes with one opened key, each wraps and unwraps, and what they wrap differs if it is salted."""
        salted = key.wrap(b"0123456789abcdef") != key.wrap(b"0123456789abcdef")
        theirs = bytes.fromhex(in_child(lambda: key.wrap(b"0123456789abcdef").hex()))
        ours = key.wrap(b"0123456789abcdef")
        assert key.unwrap(theirs) == key.unwrap(ours) == b"0123456789abcdef"
        assert (theirs != ours) or not salted

    def test_it_is_stale_once_its_file_has_changed(self, made: Made, key: KeyHandle) -> None:
        if made.file is None:
            pytest.skip("this key is in no file")
        assert isinstance(key, Watched)
        assert key.stale() is False
        data = made.file.read_bytes()
        new = made.file.with_name("new")
        new.touch(0o600)
        new.write_bytes(data)
        new.replace(made.file)
        assert key.stale() is True
        again = open_key(made)
        assert isinstance(again, Watched)
        assert again.stale() is False
        made.file.unlink()
        assert again.stale() is True

    def test_after_it_was_closed_it_wraps_nothing_or_wraps_well(self, made: Made, key: KeyHandle) -> None:
        """Calls may be under way when a key is closed: they may fail, but not wrap with what is left of it."""
        if not isinstance(key, Closable):
            pytest.skip("this key cannot be closed")
        before = key.wrap(b"0123456789abcdef")
        key.close()
        try:
            wrapped = key.wrap(b"0123456789abcdef")
        except ModuleFailed:
            wrapped = before
        assert open_key(made).unwrap(wrapped) == b"0123456789abcdef"

    def test_a_wrong_passphrase_is_module_failed_and_not_shown(self, made: Made) -> None:
        if not made.passphrase:
            pytest.skip("this key has no passphrase")
        with pytest.raises(ModuleFailed) as caught:
            made.module.open(made.signature, made.blob, Told(b"a-wrong-passphrase"))
        for secret in (b"a-wrong-passphrase", made.passphrase):
            assert secret.decode("utf-8", "replace") not in f"{caught.value!r} {caught.value.__cause__!r}"

    def test_a_passphrase_that_is_not_at_hand_is_not_the_modules_matter(self, made: Made) -> None:
        if not made.passphrase:
            pytest.skip("this key has no passphrase")
        with pytest.raises(Refused, match="locked"):
            made.module.open(made.signature, made.blob, Told())

    def test_the_passphrase_that_it_was_given_is_wiped(self, made: Made) -> None:
        if not made.passphrase:
            pytest.skip("this key has no passphrase")
        told = Told(made.passphrase)
        made.module.open(made.signature, made.blob, told)
        assert told.given
        assert told.wiped()

    @pytest.mark.parametrize("blob", [b"", b"\0", b"x", b"\xff" * 100, bytes(4096)])
    def test_a_blob_that_makes_no_sense_is_module_failed(self, made: Made, blob: bytes) -> None:
        with pytest.raises(ModuleFailed):
            made.module.open(made.signature, blob, Told(made.passphrase))

    def test_another_keys_signature_is_module_failed(self, made: Made) -> None:
        with pytest.raises(ModuleFailed):
            made.module.open("0" * 16, made.blob, Told(made.passphrase))


def open_key(made: Made) -> KeyHandle:
    """The key, opened with its passphrase."""
    return made.module.open(made.signature, made.blob, Told(made.passphrase))

"""What key modules share: sources of passphrases, lengths, limits, and handles of keys in files."""

from __future__ import annotations

from pathlib import Path

import pytest

from upcall.core.errors import ModuleFailed, UsageError
from upcall.keymodule import MAX_KEY, Limits, Making, Watched
from upcall.keys.base import FileHandle, check_clear, check_new, check_room, check_source, self_test, wipe
from upcall.keys.private_file import fingerprint
from upcall.testing.secrets import GivenSecrets

WORD = b"correct horse"


@pytest.mark.parametrize("source", ["ask", "keyring", "none", "file:/word", "file:/a b"])
def test_a_known_passphrase_source_is_accepted(source: str) -> None:
    check_source(source)


@pytest.mark.parametrize(
    "source", ["", "moon", "compat", "ASK", "ask ", "file:", "file:word", "file:/word\0x", "ask\0"]
)
def test_an_invalid_passphrase_source_is_refused(source: str) -> None:
    with pytest.raises(UsageError, match="says nothing about where"):
        check_source(source)


def test_the_source_none_is_refused_for_a_key_that_needs_a_passphrase() -> None:
    check_source("ask", none=False)
    with pytest.raises(UsageError, match="'none' says nothing"):
        check_source("none", none=False)


@pytest.mark.parametrize(
    ("word", "source", "fit"), [(WORD, "ask", True), (b"", "none", True), (WORD, "none", False), (b"", "ask", False)]
)
def test_a_new_key_file_needs_a_passphrase_or_the_source_none(word: bytes, source: str, fit: bool) -> None:
    making = Making(Path("/k"), {}, bytearray(word), source, Limits(), GivenSecrets())
    if fit:
        check_new(making)
        return
    with pytest.raises(UsageError, match="has a passphrase, or the source"):
        check_new(making)


def test_a_clear_key_that_is_empty_or_too_long_is_refused() -> None:
    for size in (1, MAX_KEY):
        check_clear(bytes(size))
    for size in (0, MAX_KEY + 1):
        with pytest.raises(ModuleFailed, match=f"{size} bytes to wrap, 1 to {MAX_KEY}"):
            check_clear(bytes(size))


def test_a_caller_without_room_for_the_wrapped_key_is_refused() -> None:
    check_room(116, Limits(MAX_KEY, 116))
    with pytest.raises(ModuleFailed, match="up to 116 bytes, there is room for 115"):
        check_room(116, Limits(MAX_KEY, 115))


def test_a_key_that_does_not_unwrap_what_it_wrapped_fails_its_self_test() -> None:
    self_test(bytes, bytes)
    with pytest.raises(ModuleFailed, match=r"^the key does not unwrap"):
        self_test(bytes, lambda _: b"something else")
    with pytest.raises(ModuleFailed, match=r"^/k: the key does not unwrap"):
        self_test(bytes, lambda _: b"something else", "/k")


def test_a_handle_is_stale_once_its_file_has_changed_or_gone(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"a")
    handle = FileHandle(str(path), fingerprint(path.stat()))
    assert isinstance(handle, Watched)
    assert not handle.stale()
    path.write_bytes(b"ab")
    assert handle.stale()
    path.unlink()
    assert handle.stale()


def test_wiping_keeps_the_size() -> None:
    buffer = bytearray(WORD)
    wipe(buffer)
    assert buffer == bytes(len(WORD))

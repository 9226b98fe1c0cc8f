"""Making and opening keys that are made of a passphrase, and refusing the wrong ones."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from upcall_passphrase import Handle, module
from upcall_passphrase.blob import Blob, pack_blob, signature_of, take_blob
from upcall_passphrase.derived import Cost, derive

from upcall.core.errors import ModuleFailed, Refused, UsageError
from upcall.keymodule import (
    API,
    MAX_KEY,
    Closable,
    Enrolled,
    KeyImporter,
    KeyMaker,
    KeyModule,
    Limits,
    Making,
    Public,
    Watched,
)
from upcall.testing.secrets import GivenSecrets

WORD = b"correct horse"
CHEAP = Cost(1, 1)  # too cheap for `generate`, not for `open`


def making(word: bytes = WORD, source: str = "ask", memory: str = "64", passes: str = "1") -> Making:
    values = {"memory": memory, "passes": passes}
    return Making(Path("/nowhere"), values, bytearray(word), source, Limits(), GivenSecrets())


def cheap(source: str = "ask") -> Enrolled:
    salt = os.urandom(16)
    blob = Blob(CHEAP, salt, derive(bytearray(WORD), salt, CHEAP).check, source)
    return Enrolled(signature_of(blob), pack_blob(blob), "")


@pytest.fixture(scope="module")
def made() -> Enrolled:
    return cheap()


def open_(made: Enrolled) -> Handle:
    return module.open(made.signature, made.blob, GivenSecrets(WORD))


def test_the_module_makes_keys_and_cannot_import_them(made: Enrolled) -> None:
    typed: KeyModule = module
    assert (typed.name, typed.api) == ("passphrase", API)
    assert isinstance(module, KeyMaker)
    assert not isinstance(module, KeyImporter)
    assert (module.suffix, module.takes_passphrase) == ("", True)
    assert all(one.default in one.choices for one in module.parameters)
    handle = open_(made)
    assert isinstance(handle, Closable)
    assert not isinstance(handle, Watched)
    assert not isinstance(handle, Public)


# --- making -------------------------------------------------------------------------------------------------


def test_a_generated_key_opens_and_unwraps_every_size(tmp_path: Path) -> None:
    asked = making()._replace(path=tmp_path / "key")
    made = module.generate(asked)
    assert not list(tmp_path.iterdir())
    assert made.description == "Argon2id, 64 MiB x 1"
    told = take_blob(made.blob)
    assert (told.cost, told.source) == (Cost(64, 1), "ask")
    assert made.signature == signature_of(told)
    assert WORD not in made.blob
    assert asked.passphrase == WORD  # whoever made it wipes it
    handle = open_(made)
    for size in (1, 19, 35, 67):
        clear = os.urandom(size)
        wrapped = handle.wrap(clear)
        assert size < len(wrapped) <= 80
        assert handle.unwrap(wrapped) == clear
    assert open_(made).unwrap(handle.wrap(b"x")) == b"x"


def test_the_same_passphrase_makes_another_key() -> None:
    one, other = module.generate(making()), module.generate(making())
    assert one.signature != other.signature
    with pytest.raises(ModuleFailed):
        open_(one).unwrap(open_(other).wrap(b"x"))


def test_what_the_defaults_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.15 s of an ordinary processor; where it is more than a second, see `test_a_machine_that_is_too_slow`."""
    monkeypatch.setattr("upcall_passphrase.MAX_SECONDS", math.inf)
    values = {one.name: one.default or "" for one in module.parameters}
    made = module.generate(making()._replace(values=values))
    assert made.description == "Argon2id, 64 MiB x 3"
    open_(made)


@pytest.mark.parametrize(
    "asked",
    [
        making(source="none"),
        making(b"", "none"),
        making(b""),
        making(source="compat"),
        making(source="file:relative"),
        making(memory="256", passes="3"),
        making(memory="512"),
        making(memory="32"),
        making(memory="lots"),
        making()._replace(values={}),
    ],
    ids=lambda asked: f"{asked.source} {len(asked.passphrase)} {asked.values}",
)
def test_bad_settings_for_a_new_key_are_refused(asked: Making) -> None:
    with pytest.raises(UsageError):
        module.generate(asked)


def test_a_caller_with_too_little_room_is_refused() -> None:
    asked = making()._replace(limits=Limits(MAX_KEY, 79))
    with pytest.raises(ModuleFailed, match="up to 80 bytes, there is room for 79"):
        module.generate(asked)
    module.generate(asked._replace(limits=Limits(MAX_KEY, 80)))


def test_a_cost_too_high_for_the_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upcall_passphrase.MAX_SECONDS", 0.0)
    with pytest.raises(ModuleFailed, match="choose less memory or fewer passes"):
        module.generate(making())


# --- opening ------------------------------------------------------------------------------------------------


def test_a_wrong_passphrase_is_refused_and_wiped(made: Enrolled) -> None:
    for word in (b"battery staple", b"", b"correct hors", b"correct horse\n"):
        secrets = GivenSecrets(word)
        with pytest.raises(ModuleFailed, match=f"a wrong passphrase for the key {made.signature}") as caught:
            module.open(made.signature, made.blob, secrets)
        assert not word or word.decode() not in str(caught.value)
        assert secrets.given == [bytearray(len(word))]


def test_the_passphrase_is_wiped(made: Enrolled) -> None:
    secrets = GivenSecrets(WORD)
    module.open(made.signature, made.blob, secrets)
    assert secrets.given == [bytearray(len(WORD))]


def test_a_passphrase_that_cannot_be_had_is_refused_as_locked(made: Enrolled) -> None:
    with pytest.raises(Refused, match="locked"):
        module.open(made.signature, made.blob, GivenSecrets())


def test_the_passphrase_is_taken_from_the_source_in_the_blob() -> None:
    asked = []

    class Noting(GivenSecrets):
        def passphrase(self, source: str, /) -> bytearray:
            asked.append(source)
            return super().passphrase(source)

    made = cheap("file:/run/secret")
    module.open(made.signature, made.blob, Noting(WORD))
    assert asked == ["file:/run/secret"]


def test_another_signature_asks_for_no_passphrase(made: Enrolled) -> None:
    secrets = GivenSecrets(WORD)
    with pytest.raises(ModuleFailed, match="the auth token is for 0000000000000000"):
        module.open("0" * 16, made.blob, secrets)
    assert not secrets.given


def test_a_changed_blob_is_refused_before_anything_is_derived(made: Enrolled) -> None:
    """A salt, cost or check value that was changed is seen before anything is derived."""
    for at in range(len(made.blob) - len(b"\0\3ask")):
        changed = made.blob[:at] + bytes((made.blob[at] ^ 1,)) + made.blob[at + 1 :]
        secrets = GivenSecrets(WORD)
        with pytest.raises(ModuleFailed):
            module.open(made.signature, changed, secrets)
        assert not secrets.given


def test_a_malformed_blob_is_refused() -> None:
    with pytest.raises(ModuleFailed, match="passphrase blob: 1 bytes"):
        module.open("0" * 16, b"\x01", GivenSecrets(WORD))


_NO_MEMORY = """
import resource
from upcall_passphrase.derived import Cost
from upcall_passphrase import _derive
from upcall.core.errors import ModuleFailed
_derive(bytearray(b"word"), bytes(16), Cost(1, 1))
with open("/proc/self/statm") as statm:
    used = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), -1))
try:
    _derive(bytearray(b"word"), bytes(16), Cost(256, 1))
except ModuleFailed as error:
    print(error)
"""


def test_a_key_whose_memory_cannot_be_had_is_refused_with_the_size() -> None:
    done = subprocess.run([sys.executable, "-c", _NO_MEMORY], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "there is no memory of 256 MiB to derive the key in\n"


# --- wrapping and unwrapping --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 68, 1000])
def test_a_file_key_of_a_bad_size_is_not_wrapped(made: Enrolled, size: int) -> None:
    with pytest.raises(ModuleFailed, match=f"{size} bytes to wrap, 1 to 67"):
        open_(made).wrap(bytes(size))


@pytest.mark.parametrize("size", [0, 8, 15, 17, 79, 81, 88, 512, 8000])
def test_a_wrapped_key_of_a_bad_size_is_refused(made: Enrolled, size: int) -> None:
    with pytest.raises(ModuleFailed, match=f"{size} bytes, 16 to 80 are possible"):
        open_(made).unwrap(bytes(size))


def test_a_changed_or_cut_wrapped_key_is_refused(made: Enrolled) -> None:
    handle = open_(made)
    wrapped = handle.wrap(bytes(67))
    for at in range(len(wrapped)):
        changed = wrapped[:at] + bytes((wrapped[at] ^ 1,)) + wrapped[at + 1 :]
        with pytest.raises(ModuleFailed, match="did not wrap these 80 bytes"):
            handle.unwrap(changed)
    for size in range(len(wrapped)):
        with pytest.raises(ModuleFailed):
            handle.unwrap(wrapped[:size])
    with pytest.raises(ModuleFailed):
        handle.unwrap(wrapped + bytes(8))


_FUZZED = Handle(bytearray(os.urandom(32)))


@given(
    st.one_of(st.binary(max_size=140), st.integers(2, 66).flatmap(lambda n: st.binary(min_size=8 * n, max_size=8 * n)))
)
def test_any_bytes_are_refused_as_a_wrapped_key(wrapped: bytes) -> None:
    with pytest.raises(ModuleFailed):
        _FUZZED.unwrap(wrapped)


def test_the_repr_shows_no_secret() -> None:
    assert repr(Handle(bytearray(32))) == "Handle(open)"


def test_a_closed_key_is_wiped_and_wraps_nothing() -> None:
    kek = bytearray(os.urandom(32))
    handle = Handle(kek)
    wrapped = handle.wrap(b"x")
    handle.close()
    assert kek == bytes(32)
    with pytest.raises(ModuleFailed, match="closed"):
        handle.wrap(b"x")
    with pytest.raises(ModuleFailed, match="closed"):
        handle.unwrap(wrapped)


def test_a_key_closed_by_another_thread_never_wraps_with_wiped_bytes() -> None:
    """Whatever was wrapped was wrapped with the key, and not with what wiping leaves."""
    kek = bytearray(os.urandom(32))
    other, handle, wrapped = Handle(kek.copy()), Handle(kek), []
    started, failed = threading.Event(), []

    def work() -> None:
        try:
            while True:
                wrapped.append(handle.wrap(b"a file's key"))
                started.set()
        except ModuleFailed as error:
            failed.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    assert started.wait(60)
    handle.close()
    thread.join(60)
    assert failed == ["the key was closed"]
    assert set(wrapped) == {other.wrap(b"a file's key")}


def test_two_threads_wrap_and_unwrap_at_once(made: Enrolled) -> None:
    start, right = threading.Barrier(2), []

    def work() -> None:
        start.wait(60)
        handle = open_(made)
        for _ in range(500):
            clear = os.urandom(67)
            right.append(handle.unwrap(handle.wrap(clear)) == clear)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert right == [True] * 1000

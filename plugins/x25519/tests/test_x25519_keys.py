"""Making, importing and opening X25519 keys in files, and refusing the wrong ones."""

from __future__ import annotations

import base64
import os
import shutil
import stat
import subprocess
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import x25519
from hypothesis import given
from hypothesis import strategies as st
from upcall_x25519 import FORMS, MAX_FILE, Handle, module, signature_of
from upcall_x25519.blob import Blob, pack_blob, take_blob
from upcall_x25519.sealed import OVERHEAD, SUITES, seal

from upcall.core.errors import ModuleFailed, UsageError
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
from upcall.testing.pem_contract import WORD, PemModuleContract, write_key
from upcall.testing.secrets import GivenSecrets


class TestKeyFiles(PemModuleContract):
    module, kind, limit = module, "X25519", MAX_FILE
    values = {"cipher": "aes-256-gcm"}

    def new_key(self) -> x25519.X25519PrivateKey:
        return x25519.X25519PrivateKey.generate()

    def blob(self, path: Path, source: str) -> bytes:
        return pack_blob(Blob(str(path), source, 0x12))


def making(path: Path, word: bytes = WORD, source: str = "ask", cipher: str = "aes-256-gcm") -> Making:
    return Making(path, {"cipher": cipher}, bytearray(word), source, Limits(), GivenSecrets())


@pytest.fixture
def pem(tmp_path: Path) -> Path:
    return write_key(tmp_path / "key.pem", x25519.X25519PrivateKey.generate())


@pytest.fixture
def made(tmp_path: Path) -> Enrolled:
    return module.generate(making(tmp_path / "made.pem"))


def open_(made: Enrolled) -> Handle:
    return module.open(made.signature, made.blob, GivenSecrets(WORD))


def test_the_module_makes_and_imports_keys(made: Enrolled) -> None:
    typed: KeyModule = module
    assert (typed.name, typed.api) == ("x25519", API)
    assert isinstance(module, KeyMaker)
    assert isinstance(module, KeyImporter)
    assert module.parameters[0].default in FORMS
    handle = open_(made)
    assert isinstance(handle, Watched)
    assert isinstance(handle, Public)
    assert not isinstance(handle, Closable)


# --- making and importing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cipher", FORMS)
def test_a_generated_key_opens_and_unwraps_every_size(tmp_path: Path, cipher: str) -> None:
    path = tmp_path / "new.pem"
    made = module.generate(making(path, cipher=cipher))
    assert made.description == "X25519"
    assert take_blob(made.blob) == Blob(str(path), "ask", FORMS[cipher])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes().startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
    assert list(tmp_path.iterdir()) == [path]
    assert module.import_key(making(path, cipher=cipher)) == made
    handle = open_(made)
    for size in (1, 19, 35, 67):
        clear = os.urandom(size)
        wrapped = handle.wrap(clear)
        assert len(wrapped) == size + OVERHEAD == size + 49
        assert wrapped[0] == FORMS[cipher]
        assert handle.unwrap(wrapped) == clear
        assert handle.wrap(clear) != wrapped


def test_a_key_unwraps_what_was_wrapped_with_another_cipher(pem: Path) -> None:
    handles = [open_(module.import_key(making(pem, cipher=cipher))) for cipher in FORMS]
    for one in handles:
        for other in handles:
            assert other.unwrap(one.wrap(b"clear")) == b"clear"


@pytest.mark.parametrize(
    ("word", "source", "cipher"),
    [
        (WORD, "none", "aes-256-gcm"),
        (b"", "ask", "aes-256-gcm"),
        (WORD, "moon", "aes-256-gcm"),
        (WORD, "compat", "aes-256-gcm"),
        (WORD, "ask", "rot13"),
    ],
)
def test_bad_settings_for_a_new_key_are_refused(tmp_path: Path, word: bytes, source: str, cipher: str) -> None:
    with pytest.raises(UsageError):
        module.generate(making(tmp_path / "new.pem", word, source, cipher))
    assert not list(tmp_path.iterdir())


def test_a_caller_with_too_little_room_is_refused(tmp_path: Path) -> None:
    asked = making(tmp_path / "new.pem")._replace(limits=Limits(MAX_KEY, 115))
    with pytest.raises(ModuleFailed, match="up to 116 bytes, there is room for 115"):
        module.generate(asked)
    assert not list(tmp_path.iterdir())
    module.generate(asked._replace(limits=Limits(MAX_KEY, 116)))


def test_import_of_an_encrypted_file_needs_a_source(pem: Path) -> None:
    with pytest.raises(UsageError, match="must be kept somewhere"):
        module.import_key(making(pem, WORD, "none"))
    with pytest.raises(UsageError, match="says nothing about where"):
        module.import_key(making(pem, WORD, "compat"))


OPENSSL = shutil.which("openssl")


@pytest.mark.skipif(OPENSSL is None, reason="needs the openssl command (Debian: openssl)")
@pytest.mark.parametrize("options", [["-v2", "aes-256-cbc"], ["-scrypt"], ["-nocrypt"]])
def test_keys_that_the_openssl_command_made_are_imported_and_used(tmp_path: Path, options: list[str]) -> None:
    assert OPENSSL is not None
    path, word = tmp_path / "key.pem", tmp_path / "word"
    word.write_bytes(WORD)
    made = subprocess.run([OPENSSL, "genpkey", "-algorithm", "X25519"], capture_output=True, check=True, timeout=60)
    path.touch(0o600)
    command = [OPENSSL, "pkcs8", "-topk8", *options, "-passout", f"file:{word}", "-out", str(path)]
    subprocess.run(command, input=made.stdout, check=True, timeout=60)
    enrolled = module.import_key(making(path))
    handle = module.open(enrolled.signature, enrolled.blob, GivenSecrets(WORD))
    assert handle.unwrap(handle.wrap(bytes(67))) == bytes(67)
    public = subprocess.run(
        [OPENSSL, "pkey", "-pubout"], input=made.stdout, capture_output=True, check=True, timeout=60
    )
    assert handle.export_public() == public.stdout


# --- opening ------------------------------------------------------------------------------------------------


def test_a_malformed_blob_is_refused() -> None:
    with pytest.raises(ModuleFailed, match="x25519 blob: version 2"):
        module.open("0" * 16, b"\x02\x12", GivenSecrets())


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_key_of_a_bad_size_is_refused(tmp_path: Path, size: int) -> None:
    """PKCS #8 as RFC 8410 has it, but for the size."""
    key = bytes((0x04, size)) + bytes(size)
    body = bytes.fromhex("020100300506032b656e") + bytes((0x04, len(key))) + key
    text = base64.encodebytes(bytes((0x30, len(body))) + body)
    path = tmp_path / "key.pem"
    path.touch(0o600)
    path.write_bytes(b"-----BEGIN PRIVATE KEY-----\n" + text + b"-----END PRIVATE KEY-----\n")
    with pytest.raises(ModuleFailed, match="not a sound private key"):
        module.import_key(making(path, b""))


@pytest.mark.parametrize("word", [WORD, None])
def test_a_damaged_file_is_refused_or_the_same_key(tmp_path: Path, word: bytes | None) -> None:
    """Each byte changed in turn. Some mean nothing; these leave the same key."""
    key = x25519.X25519PrivateKey.generate()
    path, signature = write_key(tmp_path / "key.pem", key, word), signature_of(key.public_key())
    good = path.read_bytes()
    blob = pack_blob(Blob(str(path), "ask" if word else "none", 0x12))
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes((good[at] ^ 1,)) + good[at + 1 :])
        try:
            module.open(signature, blob, GivenSecrets(WORD))
        except ModuleFailed as error:
            assert str(path) in str(error)


def test_the_repr_shows_no_secret(tmp_path: Path, made: Enrolled) -> None:
    assert repr(open_(made)) == f"Handle('{tmp_path / 'made.pem'}', X25519)"


# --- wrapping and unwrapping --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 68, 1000])
def test_a_file_key_of_a_bad_size_is_not_wrapped(made: Enrolled, size: int) -> None:
    with pytest.raises(ModuleFailed, match=f"{size} bytes to wrap, 1 to 67"):
        open_(made).wrap(bytes(size))


def test_a_changed_or_cut_wrapped_key_is_refused(made: Enrolled) -> None:
    """Also the bit of the point that RFC 7748 masks: HPKE hashes the point as it was sent."""
    handle = open_(made)
    wrapped = handle.wrap(bytes(67))
    for at in range(len(wrapped)):
        for bit in (1, 0x80):
            changed = wrapped[:at] + bytes((wrapped[at] ^ bit,)) + wrapped[at + 1 :]
            with pytest.raises(ModuleFailed):
                handle.unwrap(changed)
    for size in range(len(wrapped)):
        with pytest.raises(ModuleFailed):
            handle.unwrap(wrapped[:size])
    with pytest.raises(ModuleFailed):
        handle.unwrap(wrapped + b"\0")


def test_bytes_that_another_key_wrapped_are_refused(tmp_path: Path, made: Enrolled) -> None:
    other = open_(module.generate(making(tmp_path / "other.pem")))
    with pytest.raises(ModuleFailed, match="did not seal these 53 bytes"):
        open_(made).unwrap(other.wrap(b"four"))


@pytest.mark.parametrize("form", SUITES)
@pytest.mark.parametrize("size", [0, 68, 463])
def test_a_well_sealed_key_of_a_bad_size_is_refused(tmp_path: Path, form: int, size: int) -> None:
    """Anyone with the public key can seal such bytes."""
    key = x25519.X25519PrivateKey.generate()
    path = write_key(tmp_path / "key.pem", key, None)
    handle = open_(module.import_key(making(path)))
    with pytest.raises(ModuleFailed, match=f"did not seal these {size + 49} bytes: 50 to 116 bytes are possible"):
        handle.unwrap(seal(form, bytes(size), key.public_key()))


_FUZZED = Handle(x25519.X25519PrivateKey.generate(), 0x12, "/fuzz", None)  # type: ignore[arg-type]


@given(st.binary(max_size=140))
def test_any_bytes_are_refused_as_a_wrapped_key(wrapped: bytes) -> None:
    with pytest.raises(ModuleFailed):
        _FUZZED.unwrap(wrapped)


@given(st.sampled_from(sorted(SUITES)), st.binary(min_size=49, max_size=115))
def test_nearly_right_bytes_are_refused_as_a_wrapped_key(form: int, rest: bytes) -> None:
    with pytest.raises(ModuleFailed):
        _FUZZED.unwrap(bytes((form,)) + rest)


def test_two_threads_wrap_and_unwrap_at_once(made: Enrolled) -> None:
    handle, start, right = open_(made), threading.Barrier(2), []

    def work() -> None:
        start.wait(60)
        for _ in range(500):
            clear = os.urandom(67)
            right.append(handle.unwrap(handle.wrap(clear)) == clear)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert right == [True] * 1000

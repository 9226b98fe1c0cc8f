"""Making, enrolling and opening RSA keys in files, and refusing the wrong ones."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    PrivateFormat,
    load_pem_public_key,
)
from upcall_rsa import MAX_FILE, module
from upcall_rsa.blob import Blob, pack_blob, take_blob

from upcall.core.errors import ModuleFailed, UsageError
from upcall.keymodule import API, Enrolled, KeyImporter, KeyMaker, KeyModule, Limits, Making, Public
from upcall.testing.pem_contract import WORD, PemModuleContract, write_key
from upcall.testing.secrets import GivenSecrets


class TestKeyFiles(PemModuleContract):
    module, kind, limit = module, "RSA", MAX_FILE
    values = {"bits": "2048"}
    key = rsa.generate_private_key(65537, 2048)

    def new_key(self) -> rsa.RSAPrivateKey:
        return self.key

    def blob(self, path: Path, source: str) -> bytes:
        return pack_blob(Blob(str(path), source))


@pytest.fixture(scope="module")
def small() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def making(path: Path, word: bytes = WORD, source: str = "ask", bits: int = 2048) -> Making:
    return Making(path, {"bits": str(bits)}, bytearray(word), source, Limits(), GivenSecrets())


def enrol(path: Path, word: bytes = WORD, source: str = "ask") -> Enrolled:
    return module.import_key(Making(path, {}, bytearray(word), source, Limits(), GivenSecrets()))


@pytest.fixture
def pem(tmp_path: Path, small: rsa.RSAPrivateKey) -> Path:
    return write_key(tmp_path / "key.pem", small)


def test_the_module_makes_and_imports_keys() -> None:
    assert isinstance(module, KeyMaker)
    assert isinstance(module, KeyImporter)
    typed: KeyModule = module
    assert (typed.name, typed.api) == ("openssl", API)
    assert (module.suffix, module.takes_passphrase) == (".pem", True)
    assert module.parameters[0].default == "3072"


# --- making and enrolling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2048, 3072, 4096])
def test_a_generated_key_opens_and_unwraps_every_size(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "new.pem"
    made = module.generate(making(path, bits=bits))
    assert made.description == f"RSA-{bits}"
    assert take_blob(made.blob) == Blob(str(path), "ask")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes().startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
    assert list(tmp_path.iterdir()) == [path]
    assert enrol(path) == made
    handle = module.open(made.signature, made.blob, GivenSecrets(WORD))
    for size in (1, 19, 67):
        clear = os.urandom(size)
        wrapped = handle.wrap(clear)
        assert len(wrapped) == bits // 8
        assert handle.unwrap(wrapped) == clear


@pytest.mark.parametrize("shape", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
@pytest.mark.parametrize("word", [WORD, None])
def test_every_form_of_pem_is_enrolled_and_opened(
    tmp_path: Path, small: rsa.RSAPrivateKey, shape: PrivateFormat, word: bytes | None
) -> None:
    path = write_key(tmp_path / "key.pem", small, word, shape)
    enrolled = enrol(path, word or b"", "keyring")
    assert take_blob(enrolled.blob) == Blob(str(path), "keyring" if word else "none")
    handle = module.open(enrolled.signature, enrolled.blob, GivenSecrets(WORD))
    assert handle.unwrap(handle.wrap(b"x")) == b"x"


def test_a_compat_blob_holds_the_passphrase_as_with_ecryptfs_utils(pem: Path) -> None:
    enrolled = enrol(pem, source="compat")
    assert take_blob(enrolled.blob) == Blob(str(pem), None, WORD)
    handle = module.open(enrolled.signature, enrolled.blob, GivenSecrets())
    assert handle.unwrap(handle.wrap(b"x")) == b"x"


def test_keys_of_ecryptfs_utils_are_imported(tmp_path: Path) -> None:
    """ecryptfs-manager makes keys of 1024 bits."""
    path = write_key(tmp_path / "key.pem", rsa.generate_private_key(65537, 1024))
    enrolled = enrol(path)
    assert enrolled.description == "RSA-1024"
    handle = module.open(enrolled.signature, enrolled.blob, GivenSecrets(WORD))
    assert handle.unwrap(handle.wrap(bytes(67))) == bytes(67)


def test_enrol_refuses_a_key_too_long_for_ecryptfs(tmp_path: Path) -> None:
    path = write_key(tmp_path / "key.pem", rsa.generate_private_key(65537, 4104))
    with pytest.raises(ModuleFailed, match="RSA-4104, 1024 to 4096 bits"):
        enrol(path)


def test_enrol_refuses_a_key_whose_parts_do_not_belong_together(tmp_path: Path, small: rsa.RSAPrivateKey) -> None:
    """`open` does not check the parts: the signature keeps such a key from it."""
    good = small.private_numbers()
    other = rsa.generate_private_key(65537, 2048).private_numbers()
    bad = rsa.RSAPrivateNumbers(
        good.p, good.q, other.d, good.dmp1, good.dmq1, good.iqmp, good.public_numbers
    ).private_key(unsafe_skip_rsa_key_validation=True)
    path = write_key(tmp_path / "key.pem", bad, None)
    with pytest.raises(ModuleFailed, match="not a sound private key"):
        enrol(path, b"")


# --- opening ------------------------------------------------------------------------------------------------


def test_a_malformed_blob_is_refused() -> None:
    with pytest.raises(ModuleFailed, match="openssl blob: ends before the path at byte 0"):
        module.open("0" * 16, b"", GivenSecrets())


@pytest.mark.parametrize("word", [WORD, b"battery staple"])
def test_the_passphrase_is_wiped(pem: Path, word: bytes) -> None:
    enrolled = enrol(pem)
    secrets = GivenSecrets(word)
    try:
        module.open(enrolled.signature, enrolled.blob, secrets)
    except ModuleFailed:
        assert word != WORD
    assert len(secrets.given) == 1
    assert secrets.wiped()


def test_enrol_without_a_file_is_refused() -> None:
    with pytest.raises(UsageError, match="from a file"):
        enrol(Path())


# --- the handle ---------------------------------------------------------------------------------------------


def test_bytes_that_the_key_did_not_wrap_are_refused(pem: Path) -> None:
    enrolled = enrol(pem)
    handle = module.open(enrolled.signature, enrolled.blob, GivenSecrets(WORD))
    wrapped = bytearray(handle.wrap(b"a key"))
    wrapped[-1] ^= 1
    for broken in (bytes(wrapped), bytes(wrapped[:-1]), b"", b"\xff" * 256, b"\xff" * 512):
        with pytest.raises(ModuleFailed, match="this key did not wrap") as caught:
            handle.unwrap(broken)
        assert caught.value.__context__ is None
    for size in (0, 68):
        with pytest.raises(ModuleFailed, match=f"{size} bytes to wrap"):
            handle.wrap(bytes(size))


def test_keys_that_the_openssl_command_made_are_enrolled_and_used(tmp_path: Path) -> None:
    """Keys as people have made them for ecryptfs-utils, by OpenSSL's own command."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl command")
    plain = tmp_path / "plain.pem"
    run = [openssl, "genrsa", "-out", str(plain), "2048"]
    subprocess.run(run, check=True, capture_output=True, timeout=60)
    for number, form in enumerate((["-traditional", "-aes256"], ["-traditional", "-des3"], ["-aes128"])):
        path = tmp_path / f"{number}.pem"
        run = [openssl, "rsa", "-in", str(plain), "-out", str(path), "-passout", "stdin", *form]
        subprocess.run(run, input=WORD, check=True, capture_output=True, timeout=60)
        path.chmod(0o600)
        enrolled = enrol(path)
        assert enrolled.description == "RSA-2048"
        handle = module.open(enrolled.signature, enrolled.blob, GivenSecrets(WORD))
        sealed = handle.wrap(b"a key")
        (tmp_path / "sealed").write_bytes(sealed)
        run = [openssl, "pkeyutl", "-decrypt", "-inkey", str(plain), "-in", str(tmp_path / "sealed")]
        run += ["-pkeyopt", "rsa_padding_mode:oaep"]
        opened = subprocess.run(run, check=True, capture_output=True, timeout=60)
        assert opened.stdout == b"a key"


def test_the_public_half_of_a_key_is_exported(pem: Path, small: rsa.RSAPrivateKey) -> None:
    enrolled = enrol(pem)
    handle = module.open(enrolled.signature, enrolled.blob, GivenSecrets(WORD))
    assert isinstance(handle, Public)
    public = load_pem_public_key(handle.export_public())
    assert isinstance(public, rsa.RSAPublicKey)
    assert public.public_numbers() == small.public_key().public_numbers()


def test_a_key_file_swapped_for_another_is_refused(pem: Path) -> None:
    """The auth token is for the key that the file held before."""
    enrolled = enrol(pem)
    pem.unlink()
    write_key(pem, rsa.generate_private_key(65537, 2048))
    with pytest.raises(ModuleFailed, match=f"the auth token is for {enrolled.signature}"):
        module.open(enrolled.signature, enrolled.blob, GivenSecrets(WORD))

"""Making, enrolling and opening RSA keys in files, and refusing the wrong ones."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from upcall_rsa import module, signature_of
from upcall_rsa.blob import Blob, pack_blob, take_blob

from upcall.core.errors import ModuleFailed, Refused, UsageError
from upcall.keymodule import API, Enrolled, KeyImporter, KeyMaker, KeyModule, Limits, Making, Public
from upcall.testing.secrets import GivenSecrets

WORD = b"correct horse"
AnyKey = rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


@pytest.fixture(scope="module")
def small() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def making(path: Path, word: bytes = WORD, source: str = "ask", bits: int = 2048) -> Making:
    return Making(path, {"bits": str(bits)}, bytearray(word), source, Limits(), GivenSecrets())


def enrol(path: Path, word: bytes = WORD, source: str = "ask") -> Enrolled:
    return module.import_key(Making(path, {}, bytearray(word), source, Limits(), GivenSecrets()))


def write(path: Path, key: AnyKey, word: bytes | None = WORD, shape: PrivateFormat = PrivateFormat.PKCS8) -> Path:
    encryption = BestAvailableEncryption(word) if word else NoEncryption()
    path.touch(0o600)
    path.write_bytes(key.private_bytes(Encoding.PEM, shape, encryption))
    return path


@pytest.fixture
def pem(tmp_path: Path, small: rsa.RSAPrivateKey) -> Path:
    return write(tmp_path / "key.pem", small)


def test_the_shape() -> None:
    assert isinstance(module, KeyMaker)
    assert isinstance(module, KeyImporter)
    typed: KeyModule = module
    assert (typed.name, typed.api) == ("openssl", API)
    assert (module.suffix, module.takes_passphrase) == (".pem", True)
    assert module.parameters[0].default == "3072"


# --- making and enrolling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2048, 3072, 4096])
def test_generate_and_open(tmp_path: Path, bits: int) -> None:
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


def test_generate_without_a_passphrase(tmp_path: Path) -> None:
    made = module.generate(making(tmp_path / "new.pem", b"", "none"))
    module.open(made.signature, made.blob, GivenSecrets())
    assert enrol(tmp_path / "new.pem", b"") == made


def test_generate_never_overwrites(pem: Path) -> None:
    before = pem.read_bytes()
    with pytest.raises(ModuleFailed, match="is there already"):
        module.generate(making(pem))
    assert pem.read_bytes() == before
    assert list(pem.parent.iterdir()) == [pem]


def test_generate_does_not_follow_a_link(tmp_path: Path) -> None:
    (tmp_path / "new.pem").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModuleFailed, match="is there already"):
        module.generate(making(tmp_path / "new.pem"))
    assert not (tmp_path / "elsewhere").exists()


def test_generate_in_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ModuleFailed, match="No such file"):
        module.generate(making(tmp_path / "no" / "new.pem"))


@pytest.mark.parametrize(
    ("word", "source"),
    [(WORD, "none"), (b"", "ask"), (WORD, "moon")],
)
def test_generate_misused(tmp_path: Path, word: bytes, source: str) -> None:
    with pytest.raises(UsageError):
        module.generate(making(tmp_path / "new.pem", word, source))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
@pytest.mark.parametrize("word", [WORD, None])
def test_every_form_of_pem(tmp_path: Path, small: rsa.RSAPrivateKey, shape: PrivateFormat, word: bytes | None) -> None:
    path = write(tmp_path / "key.pem", small, word, shape)
    enrolled = enrol(path, word or b"", "keyring")
    assert take_blob(enrolled.blob) == Blob(str(path), "keyring" if word else "none")
    handle = module.open(enrolled.signature, enrolled.blob, GivenSecrets(WORD))
    assert handle.unwrap(handle.wrap(b"x")) == b"x"


def test_enrol_in_the_way_of_ecryptfs_utils(pem: Path) -> None:
    enrolled = enrol(pem, source="compat")
    assert take_blob(enrolled.blob) == Blob(str(pem), None, WORD)
    handle = module.open(enrolled.signature, enrolled.blob, GivenSecrets())
    assert handle.unwrap(handle.wrap(b"x")) == b"x"


def test_enrol_asks_for_a_passphrase_only_if_one_is_needed(pem: Path) -> None:
    with pytest.raises(Refused) as caught:
        enrol(pem, b"")
    assert caught.value.reason == "locked"


def test_enrol_refuses_small_keys_that_open_takes(tmp_path: Path) -> None:
    """ecryptfs-manager made such keys, and wrote their auth tokens itself."""
    path = write(tmp_path / "key.pem", rsa.generate_private_key(65537, 1024))
    with pytest.raises(ModuleFailed, match="RSA-1024, 2048 to 4096 bits"):
        enrol(path)
    key = load_pem_private_key(path.read_bytes(), WORD)
    assert isinstance(key, rsa.RSAPrivateKey)
    blob = pack_blob(Blob(str(path), None, WORD))
    handle = module.open(signature_of(key.public_key()), blob, GivenSecrets())
    assert handle.unwrap(handle.wrap(bytes(67))) == bytes(67)


def test_enrol_refuses_a_key_too_long_for_ecryptfs(tmp_path: Path) -> None:
    path = write(tmp_path / "key.pem", rsa.generate_private_key(65537, 4104))
    with pytest.raises(ModuleFailed, match="RSA-4104, 2048 to 4096 bits"):
        enrol(path)


def test_enrol_refuses_other_keys(tmp_path: Path) -> None:
    path = write(tmp_path / "key.pem", ed25519.Ed25519PrivateKey.generate())
    with pytest.raises(ModuleFailed, match="not of RSA"):
        enrol(path)


def test_enrol_validates(tmp_path: Path, small: rsa.RSAPrivateKey) -> None:
    """A key whose parts do not belong together; `open`, which trusts, is kept from it by the signature."""
    good = small.private_numbers()
    other = rsa.generate_private_key(65537, 2048).private_numbers()
    bad = rsa.RSAPrivateNumbers(
        good.p, good.q, other.d, good.dmp1, good.dmq1, good.iqmp, good.public_numbers
    ).private_key(unsafe_skip_rsa_key_validation=True)
    path = write(tmp_path / "key.pem", bad, None)
    with pytest.raises(ModuleFailed, match="not a sound private key"):
        enrol(path, b"")


# --- opening ------------------------------------------------------------------------------------------------


def fails(path: Path, why: str, word: bytes = WORD, signature: str = "0" * 16) -> None:
    with pytest.raises(ModuleFailed, match=why) as caught:
        module.open(signature, pack_blob(Blob(str(path), None, word)), GivenSecrets())
    assert str(path) in str(caught.value)
    assert word.decode() not in str(caught.value)


def test_a_wrong_passphrase(pem: Path) -> None:
    fails(pem, "wrong passphrase", b"battery staple")


def test_a_truncated_file(pem: Path) -> None:
    pem.write_bytes(pem.read_bytes()[:900])
    fails(pem, "damaged PEM")


def test_an_empty_file(pem: Path) -> None:
    pem.write_bytes(b"")
    fails(pem, "not a sound private key")


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o620, 0o602, 0o666])
def test_a_file_open_to_others(pem: Path, mode: int) -> None:
    pem.chmod(mode)
    fails(pem, f"mode {mode:04o} lets others in")


def test_a_file_of_somebody_else(pem: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give files away")
    os.chown(pem, 12345, -1)
    fails(pem, "belongs to uid 12345")
    link = pem.with_name("link.pem")
    link.symlink_to(pem)
    fails(link, "belongs to uid 12345")


def test_a_link_to_a_file_of_ours(pem: Path) -> None:
    link = pem.with_name("link.pem")
    link.symlink_to(pem)
    enrolled = enrol(link)
    assert take_blob(enrolled.blob).path == str(link)


def test_a_directory(tmp_path: Path) -> None:
    fails(tmp_path, "is a directory")


def test_a_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    fails(tmp_path / "fifo", "not a regular file")


def test_a_large_file(pem: Path) -> None:
    os.truncate(pem, 64 * 1024 + 1)
    fails(pem, "65537 bytes, at most 65536")


def test_no_file(tmp_path: Path) -> None:
    fails(tmp_path / "no.pem", "No such file")


def test_a_swapped_file(pem: Path) -> None:
    fails(pem, "the auth token is for 0000000000000000")


def test_a_bad_blob() -> None:
    with pytest.raises(ModuleFailed, match="openssl blob: ends before the path at byte 0"):
        module.open("0" * 16, b"", GivenSecrets())


def test_an_encrypted_file_that_should_not_be(pem: Path) -> None:
    with pytest.raises(ModuleFailed, match="knows of no passphrase"):
        module.open("0" * 16, pack_blob(Blob(str(pem), "none")), GivenSecrets())


def test_locked(pem: Path) -> None:
    with pytest.raises(Refused):
        module.open("0" * 16, pack_blob(Blob(str(pem), "ask")), GivenSecrets())


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


def test_which_file() -> None:
    with pytest.raises(UsageError, match="from a file"):
        enrol(Path())


# --- the handle ---------------------------------------------------------------------------------------------


def test_what_it_did_not_wrap(pem: Path) -> None:
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


def replace_by_a_copy(path: Path) -> None:
    copy = path.with_name("copy")
    shutil.copy2(path, copy)
    copy.replace(path)


@pytest.mark.parametrize(
    "change",
    [os.utime, lambda path: path.chmod(0o400), replace_by_a_copy, Path.unlink, lambda p: p.write_text("")],
)
def test_stale(pem: Path, change: Callable[[Path], object]) -> None:
    enrolled = enrol(pem)
    handle = module.open(enrolled.signature, enrolled.blob, GivenSecrets(WORD))
    assert not handle.stale()
    change(pem)
    assert handle.stale()


def test_the_openssl_command(tmp_path: Path) -> None:
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


def test_the_public_half(pem: Path, small: rsa.RSAPrivateKey) -> None:
    enrolled = enrol(pem)
    handle = module.open(enrolled.signature, enrolled.blob, GivenSecrets(WORD))
    assert isinstance(handle, Public)
    public = load_pem_public_key(handle.export_public())
    assert isinstance(public, rsa.RSAPublicKey)
    assert public.public_numbers() == small.public_key().public_numbers()

"""Private keys in PEM files. What modules make of them: upcall.testing.pem_contract, which rsa and x25519 inherit."""

from __future__ import annotations

import base64
import functools
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import PrivateFormat

from upcall.core.errors import ModuleFailed, Refused
from upcall.keys.pem import PemFile, load_pem, write_pem
from upcall.testing.pem_contract import WORD, write_key
from upcall.testing.secrets import GivenSecrets

LIMIT = 4096


def element(tag: int, *parts: bytes) -> bytes:
    """DER of one element."""
    content = b"".join(parts)
    size = len(content).to_bytes(4, "big").lstrip(b"\0")
    return bytes((tag, len(content)) if len(content) < 128 else (tag, 0x80 | len(size), *size)) + content


def integer(number: int) -> bytes:
    return element(2, number.to_bytes(number.bit_length() // 8 + 1, "big"))


def armoured(der: bytes) -> bytes:
    kind = b"ENCRYPTED PRIVATE KEY-----\n"
    return b"-----BEGIN " + kind + base64.encodebytes(der) + b"-----END " + kind


@pytest.mark.parametrize("word", [WORD, b""])
def test_a_written_pem_key_reads_back_the_same(tmp_path: Path, word: bytes) -> None:
    path, key = tmp_path / "key.pem", X25519PrivateKey.generate()
    write_pem(path, key, bytearray(word))
    with PemFile(str(path), LIMIT) as file:
        assert file.encrypted is bool(word)
        loaded = file.load(bytearray(word))
        assert isinstance(loaded, X25519PrivateKey)
        assert loaded.private_bytes_raw() == key.private_bytes_raw()


def test_the_pem_text_is_wiped_when_the_file_is_closed(tmp_path: Path) -> None:
    path = write_key(tmp_path / "key.pem", X25519PrivateKey.generate(), None)
    with PemFile(str(path), LIMIT) as file:
        text = file._pem
        assert any(text)
    assert text and not any(text)


def test_the_passphrase_comes_from_its_source_if_one_is_needed(tmp_path: Path) -> None:
    path = write_key(tmp_path / "key.pem", X25519PrivateKey.generate())
    with PemFile(str(path), LIMIT) as file:
        assert file.passphrase("ask", GivenSecrets(WORD)) == WORD
        with pytest.raises(ModuleFailed, match=f"{path}: is encrypted"):
            file.passphrase("none", GivenSecrets(WORD))
        with pytest.raises(Refused, match="locked"):
            file.passphrase("ask", GivenSecrets())
    plain = write_key(tmp_path / "plain.pem", X25519PrivateKey.generate(), None)
    with PemFile(str(plain), LIMIT) as file:
        assert file.passphrase("none", GivenSecrets()) == b""


def test_openssls_traditional_encryption_is_recognised(tmp_path: Path) -> None:
    key = generate_private_key(SECP256R1())
    path = write_key(tmp_path / "key.pem", key, WORD, PrivateFormat.TraditionalOpenSSL)
    with PemFile(str(path), LIMIT) as file:
        assert file.encrypted
        file.load(bytearray(WORD))
        assert str(file.other_kind("RSA")) == f"{path}: holds a private key, but not of RSA"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModuleFailed, match=f"{tmp_path / 'no.pem'}: No such file"):
        PemFile(str(tmp_path / "no.pem"), LIMIT)


def test_openssls_error_about_an_invalid_pem_text_is_not_shown() -> None:
    for text in (b"", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"):
        with pytest.raises(ModuleFailed, match=r"^/k: not a sound private key in PEM$") as caught:
            load_pem(bytearray(text), bytearray(), "/k")
        assert caught.value.__suppress_context__


# --- what a passphrase takes -------------------------------------------------------------------------------------

# RFC 8018, A.4: the salt, AES-256-CBC, and what is encrypted do not matter here.
SALT, CIPHER, SEALED = element(4, b"12345678"), "301d060960864801650304012a0410" + "00" * 16, element(4, bytes(64))
SHA256 = bytes.fromhex("300c06082a864886f70d02090500")


def pbkdf2(rounds: int) -> bytes:
    return pbes2("06092a864886f70d01050c", element(0x30, SALT, integer(rounds), SHA256))


def scrypt(*numbers: int) -> bytes:
    return pbes2("06092b06010401da47040b", element(0x30, SALT, *map(integer, numbers)))


def pbes2(oid: str, parameters: bytes) -> bytes:
    kdf = element(0x30, bytes.fromhex(oid), parameters)
    scheme = element(0x30, bytes.fromhex("06092a864886f70d01050d"), element(0x30, kdf, bytes.fromhex(CIPHER)))
    return armoured(element(0x30, scheme, SEALED))


def pbes1(rounds: int) -> bytes:
    oid = bytes.fromhex("060a2a864886f70d010c0103")  # SHA-1 and triple DES, of PKCS #12
    return armoured(element(0x30, element(0x30, oid, element(0x30, SALT, integer(rounds))), SEALED))


@pytest.mark.parametrize("pem", [pbkdf2(1), pbes1(1), scrypt(2, 8, 1)], ids=["PBKDF2", "PBES1", "scrypt"])
def test_a_passphrase_that_takes_little_is_tried(pem: bytes) -> None:
    with pytest.raises(ModuleFailed, match=r"^/k: a wrong passphrase, or a damaged PEM file$"):
        load_pem(bytearray(pem), bytearray(WORD), "/k")


@pytest.mark.parametrize(
    ("pem", "takes"),
    [
        (pbkdf2(5_000_001), "5000001 rounds, at most 5000000 are accepted"),
        (pbkdf2(2**63), "9223372036854775808 rounds, at most 5000000 are accepted"),
        (pbes1(5_000_001), "5000001 rounds, at most 5000000 are accepted"),
        (scrypt(2**20, 8, 2), "16777216 (N * r * p) of scrypt, at most 8388608 are accepted"),
        (scrypt(2, 8, 2**30), "17179869184 (N * r * p) of scrypt, at most 8388608 are accepted"),
        (scrypt(2**20, 8, 2, 32), "16777216 (N * r * p) of scrypt, at most 8388608 are accepted"),
        (pbkdf2(1) + pbkdf2(5_000_001), "5000001 rounds, at most 5000000 are accepted"),
    ],
    ids=["PBKDF2", "64 bits", "PBES1", "scrypt", "scrypt in parallel", "scrypt with a length", "second block"],
)
def test_a_passphrase_that_takes_too_long_is_not_tried_and_the_remedy_is_named(
    pem: bytes, takes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("upcall.keys.pem.load_pem_private_key", lambda *_, **__: pytest.fail("no signal ends this"))
    remedy = "encrypt it again, by `openssl pkcs8 -topk8 -iter 1000000`"
    with pytest.raises(ModuleFailed) as caught:
        load_pem(bytearray(pem), bytearray(WORD), "/k")
    assert str(caught.value) == f"/k: its passphrase takes {takes}: {remedy}"


@pytest.mark.parametrize(
    "pem",
    [
        pbkdf2(2**80),
        pbkdf2(1).replace(b"KEY-----\n", b"KEY-----\nX: y\n\n", 1),
        pbkdf2(1).replace(b"KEY-----\n", b"KEY-----\n*", 1),
        armoured(b""),
        armoured(b"\x30"),
        armoured(b"\x30\x80" + bytes(16)),
        armoured(b"\x30\xff" + bytes(16)),
        armoured(element(0x30, element(0x30, SALT), SEALED)),
        armoured(functools.reduce(lambda inner, _: element(0x30, inner), range(5000), b"")),
    ],
    ids=["80 bits", "header", "not base64", "empty", "one byte", "no length", "cut off", "no number", "deep"],
)
def test_a_file_that_does_not_say_what_its_passphrase_takes_is_not_tried(
    pem: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("upcall.keys.pem.load_pem_private_key", lambda *_, **__: pytest.fail("no signal ends this"))
    with pytest.raises(ModuleFailed, match=r"^/k: a damaged PEM file$"):
        load_pem(bytearray(pem), bytearray(WORD), "/k")


def test_no_passphrase_is_asked_for_that_takes_too_long(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    path.touch(0o600)
    path.write_bytes(pbkdf2(5_000_001))
    with pytest.raises(ModuleFailed, match="takes 5000001 rounds"):
        PemFile(str(path), LIMIT)

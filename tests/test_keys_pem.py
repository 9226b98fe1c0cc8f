"""Private keys in PEM files. What modules make of them: upcall.testing.pem_contract, which rsa and x25519 inherit."""

from __future__ import annotations

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

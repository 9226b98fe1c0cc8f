"""Tests a key module that keeps its keys in PEM files (`upcall.keys.pem`), as a pytest class to inherit:

class TestMyKeyFiles(PemModuleContract):
    module = module
    kind = "Ed448"
    limit = 16 * 1024

    def new_key(self) -> Ed448PrivateKey: ...
    def blob(self, path: Path, source: str) -> bytes: ...

Use it together with `KeyModuleContract`, which does not test key files.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from upcall.core.errors import ModuleFailed, Refused, UsageError
from upcall.keymodule import Enrolled, KeyImporter, KeyMaker, KeyModule, Limits, Making, Watched
from upcall.testing.secrets import GivenSecrets

WORD = b"correct horse"
_NOBODY = "0" * 16  # the signature of no key


class PemModule(KeyModule, KeyMaker, KeyImporter, Protocol):
    """A module that makes and imports keys in PEM files."""


def write_key(
    path: Path, key: PrivateKeyTypes, word: bytes | None = WORD, form: PrivateFormat = PrivateFormat.PKCS8
) -> Path:
    """Writes a key file with mode 0600, encrypted with the passphrase `word` unless that is None. Returns its path."""
    encryption = BestAvailableEncryption(word) if word else NoEncryption()
    path.touch(0o600)
    path.write_bytes(key.private_bytes(Encoding.PEM, form, encryption))
    return path


def _replace_by_a_copy(path: Path) -> None:
    copy = path.with_name("copy")
    shutil.copy2(path, copy)
    copy.replace(path)


class PemModuleContract:
    """Tests how a module makes, imports and refuses key files."""

    module: PemModule
    kind: str  # the algorithm, as in error messages: "RSA"
    limit: int  # bytes; the module refuses longer key files
    values: Mapping[str, str] = {}  # of parameters without a default, by name

    def new_key(self) -> PrivateKeyTypes:
        """Returns a private key of the module's kind. May return the same key each time if generating is slow."""
        raise NotImplementedError

    def blob(self, path: Path, source: str) -> bytes:
        """Returns the blob for a key file and the source of its passphrase."""
        raise NotImplementedError

    def making(self, path: Path, word: bytes = WORD, source: str = "ask") -> Making:
        return Making(path, self.values, bytearray(word), source, Limits(), GivenSecrets())

    @pytest.fixture
    def pem(self, tmp_path: Path) -> Path:
        return write_key(tmp_path / "key.pem", self.new_key())

    @pytest.fixture
    def taken(self, pem: Path) -> Enrolled:
        return self.module.import_key(self.making(pem))

    def fails(self, path: Path, why: str, word: bytes = WORD) -> None:
        """Asserts that opening the file fails with a text that contains `why` and the path, but no secret, and that
        the module wipes the passphrase."""
        secrets = GivenSecrets(word)
        with pytest.raises(ModuleFailed, match=why) as caught:
            self.module.open(_NOBODY, self.blob(path, "ask"), secrets)
        assert str(path) in str(caught.value)
        assert not word or word.decode() not in str(caught.value)
        assert secrets.wiped()

    # --- making ---

    def test_a_new_file_is_private_and_encrypted(self, tmp_path: Path) -> None:
        path = tmp_path / "new.pem"
        made = self.module.generate(self.making(path))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.read_bytes().startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
        assert list(tmp_path.iterdir()) == [path]
        assert made.blob == self.blob(path, "ask")
        assert self.module.import_key(self.making(path)) == made

    def test_a_new_file_without_a_passphrase(self, tmp_path: Path) -> None:
        path = tmp_path / "new.pem"
        made = self.module.generate(self.making(path, b"", "none"))
        self.module.open(made.signature, made.blob, GivenSecrets())
        assert self.module.import_key(self.making(path, b"", "ask")) == made

    def test_no_file_is_overwritten(self, pem: Path) -> None:
        before = pem.read_bytes()
        with pytest.raises(ModuleFailed, match="is there already"):
            self.module.generate(self.making(pem))
        assert pem.read_bytes() == before
        assert list(pem.parent.iterdir()) == [pem]

    def test_a_link_is_not_followed(self, tmp_path: Path) -> None:
        (tmp_path / "new.pem").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ModuleFailed, match="is there already"):
            self.module.generate(self.making(tmp_path / "new.pem"))
        assert not (tmp_path / "elsewhere").exists()

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ModuleFailed, match="No such file"):
            self.module.generate(self.making(tmp_path / "no" / "new.pem"))

    @pytest.mark.parametrize(("word", "source"), [(WORD, "none"), (b"", "ask"), (WORD, "moon"), (WORD, "compat")])
    def test_a_passphrase_and_its_source_must_fit(self, tmp_path: Path, word: bytes, source: str) -> None:
        with pytest.raises(UsageError):
            self.module.generate(self.making(tmp_path / "new.pem", word, source))
        assert not list(tmp_path.iterdir())

    # --- taking in ---

    def test_a_passphrase_is_asked_for_only_if_one_is_needed(self, tmp_path: Path, pem: Path) -> None:
        with pytest.raises(Refused) as caught:
            self.module.import_key(self.making(pem, b""))
        assert caught.value.reason == "locked"
        plain = write_key(tmp_path / "plain.pem", self.new_key(), None)
        assert self.module.import_key(self.making(plain, b"", "keyring")).blob == self.blob(plain, "none")

    def test_a_key_of_another_kind(self, tmp_path: Path) -> None:
        path = write_key(tmp_path / "key.pem", Ed25519PrivateKey.generate())
        with pytest.raises(ModuleFailed, match=f"not of {self.kind}"):
            self.module.import_key(self.making(path))

    def test_a_link_to_a_file_of_ours(self, pem: Path) -> None:
        link = pem.with_name("link.pem")
        link.symlink_to(pem)
        assert self.module.import_key(self.making(link)).blob == self.blob(link, "ask")

    # --- opening ---

    @pytest.mark.parametrize("word", [b"battery staple", b""])
    def test_a_wrong_passphrase(self, pem: Path, word: bytes) -> None:
        self.fails(pem, "wrong passphrase", word)

    def test_another_key(self, pem: Path) -> None:
        self.fails(pem, f"the auth token is for {_NOBODY}")

    def test_a_truncated_file(self, pem: Path) -> None:
        pem.write_bytes(pem.read_bytes()[:200])
        self.fails(pem, "damaged PEM")

    def test_an_empty_file(self, pem: Path) -> None:
        pem.write_bytes(b"")
        self.fails(pem, "not a sound private key")

    @pytest.mark.parametrize("mode", [0o644, 0o640, 0o620, 0o602, 0o666])
    def test_a_file_open_to_others(self, pem: Path, mode: int) -> None:
        pem.chmod(mode)
        self.fails(pem, f"mode {mode:04o} lets others in")

    def test_a_file_of_somebody_else(self, pem: Path) -> None:
        if os.geteuid():
            pytest.skip("only root can give files away")
        os.chown(pem, 12345, -1)
        self.fails(pem, "belongs to uid 12345")
        link = pem.with_name("link.pem")
        link.symlink_to(pem)
        self.fails(link, "belongs to uid 12345")

    def test_a_directory(self, tmp_path: Path) -> None:
        self.fails(tmp_path, "is a directory")

    def test_a_fifo(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo", 0o600)
        self.fails(tmp_path / "fifo", "not a regular file")

    def test_a_large_file(self, pem: Path) -> None:
        os.truncate(pem, self.limit + 1)
        self.fails(pem, f"{self.limit + 1} bytes, at most {self.limit}")

    def test_no_file(self, tmp_path: Path) -> None:
        self.fails(tmp_path / "no.pem", "No such file")

    def test_an_encrypted_file_whose_token_knows_of_no_passphrase(self, pem: Path) -> None:
        with pytest.raises(ModuleFailed, match="knows of no passphrase"):
            self.module.open(_NOBODY, self.blob(pem, "none"), GivenSecrets())

    def test_a_passphrase_that_cannot_be_had(self, taken: Enrolled) -> None:
        with pytest.raises(Refused, match="locked"):
            self.module.open(taken.signature, taken.blob, GivenSecrets())

    def test_the_passphrase_is_wiped(self, taken: Enrolled) -> None:
        secrets = GivenSecrets(WORD)
        self.module.open(taken.signature, taken.blob, secrets)
        assert secrets.given == [bytearray(len(WORD))]

    @pytest.mark.parametrize(
        "change",
        [os.utime, lambda path: path.chmod(0o400), _replace_by_a_copy, Path.unlink, lambda path: path.write_text("")],
    )
    def test_a_file_that_has_changed(self, pem: Path, taken: Enrolled, change: Callable[[Path], object]) -> None:
        handle = self.module.open(taken.signature, taken.blob, GivenSecrets(WORD))
        assert isinstance(handle, Watched)
        assert not handle.stale()
        change(pem)
        assert handle.stale()
        assert handle.unwrap(handle.wrap(b"x")) == b"x"

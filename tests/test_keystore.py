"""The key store: one file per key, and clear errors for an invalid one."""

from __future__ import annotations

import datetime
import os
import stat
from pathlib import Path

import pytest

from upcall.core.errors import PeerError, UsageError
from upcall.keys.store import Entry, KeyStore, default_directory

WHEN = datetime.datetime(2024, 5, 6, 7, 8, 9, tzinfo=datetime.UTC)
SIGNATURE = "80f0e50e8a936f95"
PARAMETERS = {"bits": "3072"}
ENTRY = Entry("home", "openssl", SIGNATURE, "ask", "RSA-3072", WHEN, "/k/ä key.pem", b"\0blob\xff", PARAMETERS)
SOUND = """\
module = "openssl"
signature = "80f0e50e8a936f95"
source = "ask"
description = "RSA-3072"
created = 2024-05-06T07:08:09Z
path = "/key.pem"
blob = "YmxvYg=="
[parameters]
bits = "3072"
"""


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path / "upcall" / "keys")


def write(store: KeyStore, text: str, name: str = "home") -> None:
    store.prepare()
    path = store.directory / f"{name}.toml"
    path.touch(0o600)
    path.write_text(text)


def test_an_entry_is_saved_privately_loaded_found_and_removed(store: KeyStore) -> None:
    assert store.names() == []
    store.save(ENTRY)
    assert store.names() == ["home"]
    assert store.load("home") == store.find("home") == store.find(ENTRY.signature) == ENTRY
    assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((store.directory / "home.toml").stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        store.save(ENTRY)
    with pytest.raises(FileExistsError):
        store.check_free("home")
    store.remove("home")
    assert store.names() == []
    store.check_free("home")


@pytest.mark.parametrize(
    "entry",
    [
        ENTRY._replace(path=None, parameters={}),
        ENTRY._replace(source="compat", blob=None),
        ENTRY._replace(source="file:/x", blob=b""),
    ],
    ids=["path and parameters", "blob", "empty blob"],
)
def test_an_entry_with_optional_fields_missing_reads_back_the_same(store: KeyStore, entry: Entry) -> None:
    store.save(entry)
    assert store.load("home") == entry


def test_saving_the_blob_of_a_compat_key_is_refused(store: KeyStore) -> None:
    with pytest.raises(UsageError, match="secret"):
        store.save(ENTRY._replace(source="compat"))
    assert store.names() == []


def test_an_unknown_key_is_a_usage_error(store: KeyStore) -> None:
    for name in ("home", "80f0e50e8a936f95"):
        with pytest.raises(UsageError, match=f"no key '{name}'"):
            store.find(name)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".hidden", "-x", "a\n", "ä", "x" * 65, "x.toml"])
def test_an_invalid_key_name_is_refused(store: KeyStore, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be the name"):
        store.load(name)


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("module =", "modul =", "unknown key 'modul'"),
        ("module =", "# ", "'module' is missing"),
        ('"openssl"', "3", "'module' must be a string"),
        ("2024-05-06T07:08:09Z", '"today"', "'created' must be a date and time"),
        ("80f0e50e8a936f95", "80F0", "'signature' is not 16 hexadecimal digits"),
        ('"/key', '"key', "'path' is not absolute"),
        ('"ask"', '"labpass"', "'source' is not ask, keyring"),
        ('"ask"', '"', "line 3"),
        ('"ask"', '"compat"', "'blob' of a compat key holds a secret"),
        ("blob =", "# ", "'blob' is missing"),
        ("YmxvYg==", "YmxvYg", "'blob' is not base64"),
        ("YmxvYg==", "YmxvYg==" * 2, "'blob' is not base64"),
        ("YmxvYg==", "YmxvYg\\u00e4", "'blob' is not base64"),
        ("YmxvYg==", "AAAA" * 1366, "'blob' has 4098 bytes"),
        ('"3072"', "3072", "'parameters.bits' must be a string"),
        ('[parameters]\nbits = "3072"', "parameters = 1", "'parameters' must be a table of strings"),
        ("module", "[module]\nmodule", "unknown|missing|string"),
    ],
)
def test_an_invalid_entry_file_is_refused_naming_file_and_field(store: KeyStore, old: str, new: str, why: str) -> None:
    write(store, SOUND)
    assert store.load("home").created == WHEN
    (store.directory / "home.toml").write_text(SOUND.replace(old, new))
    with pytest.raises(PeerError, match=why) as caught:
        store.load("home")
    assert "home.toml" in str(caught.value)


def test_an_entry_file_that_is_not_utf8_is_refused(store: KeyStore) -> None:
    write(store, SOUND)
    (store.directory / "home.toml").write_bytes(b"\xff")
    with pytest.raises(PeerError, match="codec"):
        store.load("home")


def test_an_entry_file_that_others_can_write_is_refused(store: KeyStore) -> None:
    write(store, SOUND)
    (store.directory / "home.toml").chmod(0o622)
    with pytest.raises(PermissionError, match="lets others in"):
        store.load("home")


def test_a_key_directory_that_others_can_write_is_refused(store: KeyStore) -> None:
    store.prepare()
    store.directory.chmod(0o777)
    with pytest.raises(PermissionError, match="others can write here"):
        store.save(ENTRY)


def test_a_path_that_is_not_utf8_is_refused(store: KeyStore) -> None:
    with pytest.raises(UsageError, match="not UTF-8"):
        store.save(ENTRY._replace(path="/\udcff"))


def test_the_key_directory_follows_xdg_data_home_if_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_directory() == Path("/data/upcall/keys")
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_DATA_HOME", ignored)
        assert default_directory() == Path.home() / ".local/share/upcall/keys"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: gives a folder to another user")
@pytest.mark.parametrize("linked", [False, True])
def test_a_key_directory_of_another_user_is_neither_listed_nor_read(store: KeyStore, linked: bool) -> None:
    write(store, SOUND)
    os.chown(store.directory, 65533, 65533)
    if linked:
        link = store.directory.with_name("link")
        link.symlink_to(store.directory)
        store = KeyStore(link)
    for read in (store.names, lambda: store.load("home"), lambda: store.find(SIGNATURE)):
        with pytest.raises(PermissionError, match="belongs to uid 65533, not to uid 0 or root") as error:
            read()
        assert str(store.directory) in str(error.value)


def test_an_entry_that_is_a_link_is_not_followed(store: KeyStore, tmp_path: Path) -> None:
    store.prepare()
    secret = tmp_path / "root-only"
    secret.touch(0o600)
    secret.write_text('topsecretname = "x"')
    (store.directory / "home.toml").symlink_to(secret)
    with pytest.raises(OSError, match="is a symbolic link") as error:
        store.load("home")
    assert "topsecretname" not in str(error.value)

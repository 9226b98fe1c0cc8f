"""`upcall key remove`: nothing is changed before the answer, and no key loses what another one needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fresh_key import WORD as OLD_WORD
from tests.fresh_key import fresh_key
from tests.test_cli_key import Running, daemon, home, on_a_terminal, run, shown, token_of
from upcall.kernel import keyring
from upcall.keys.mounts import MountEntry, MountStore
from upcall.keys.sharing import sharing
from upcall.keys.store import Entry, KeyStore

__all__ = ["daemon", "home"]  # the fixtures


def generate(name: str = "open") -> str:
    run("generate", name, "--bits", "2048", "--no-passphrase")
    return str(shown(name)["signature"])


def files(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "DATA/upcall/keys").iterdir())


def second_entry(name: str, of: str) -> None:
    """Another entry of the same key, as older versions of `import` made them."""
    store = KeyStore()
    entry: Entry = store.load(of)
    store.save(entry._replace(name=name, own_file=None))


# --- asking --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["", "n\n", "y\n"])
def test_remove_without_a_terminal_changes_nothing_and_names_the_option(home: Path, answer: str) -> None:
    running = Running()
    try:
        signature = generate()
        before = token_of(signature)
        done = subprocess.run(
            [sys.executable, "-c", "from upcall.cli import main; main()", "key", "remove", "open"],
            input=answer,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == os.EX_USAGE
        assert done.stderr == "upcall: no terminal to ask on, nothing was changed: --yes does it without asking\n"
        assert token_of(signature) == before
        assert files(home) == ["open.pem", "open.toml"]
        assert running.works(signature)
    finally:
        running.close()


def test_remove_changes_nothing_after_a_no(home: Path, daemon: Running) -> None:
    signature = generate()
    code, seen = on_a_terminal(["remove", "open"], ["n"])
    assert code == 1
    assert "is lost if there is no other copy" in seen and "upcall: nothing was changed" in seen
    assert keyring.find(signature) is not None
    assert files(home) == ["open.pem", "open.toml"]
    assert daemon.works(signature)


def test_remove_names_the_mounts_that_use_the_key_before_it_asks(home: Path) -> None:
    signature = generate()
    other = "0" * 16
    MountStore().save(MountEntry("private", "/a", "/b", (signature,)))
    MountStore().save(MountEntry("names", "/c", "/d", (other,), names_signature=signature))
    MountStore().save(MountEntry("foreign", "/e", "/f", (other,)))
    code, seen = on_a_terminal(["remove", "open"], ["n"])
    assert code == 1
    assert "Mounts that use it: names, private." in " ".join(seen.split())


def test_remove_names_no_mounts_if_an_equal_key_stays(home: Path) -> None:
    signature = generate()
    second_entry("second", of="open")
    MountStore().save(MountEntry("private", "/a", "/b", (signature,)))
    _, seen = on_a_terminal(["remove", "second"], ["n"])
    assert "Mounts that use it" not in seen


# --- the keyring library's passphrase ------------------------------------------------------------------------


@pytest.fixture
def deleted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The signatures whose passphrase `key remove` has deleted from the keyring library."""
    signatures: list[str] = []
    monkeypatch.setattr("upcall.cli.keyremove.delete_from_keyring", signatures.append)
    return signatures


def in_keyring(name: str) -> None:
    store = KeyStore()
    entry = store.load(name)
    store.remove(name)
    store.save(entry._replace(source="keyring"))


def test_remove_deletes_the_passphrase_in_the_keyring_library_and_says_so(home: Path, deleted: list[str]) -> None:
    signature = generate()
    in_keyring("open")
    _, seen = on_a_terminal(["remove", "open"], ["n"])
    assert "The passphrase that the keyring library keeps for it is deleted, too." in " ".join(seen.split())
    run("remove", "open", "--yes")
    assert deleted == [signature]


def test_remove_deletes_no_passphrase_that_the_keyring_library_does_not_keep(home: Path, deleted: list[str]) -> None:
    generate()
    run("remove", "open", "--yes")
    assert not deleted


def test_remove_keeps_the_passphrase_of_a_key_file_that_stays(home: Path, deleted: list[str]) -> None:
    path, _ = fresh_key(home / "key.pem")
    run("import", "old", "--file", path, word=OLD_WORD)
    in_keyring("old")
    run("remove", "old", "--yes")
    assert Path(path).exists() and not deleted


def test_remove_keeps_the_passphrase_that_an_equal_key_needs(home: Path, deleted: list[str]) -> None:
    generate()
    in_keyring("open")
    second_entry("second", of="open")
    run("remove", "second", "--yes")
    assert not deleted


def test_remove_changes_nothing_if_the_terminal_is_closed_instead_of_an_answer(home: Path) -> None:
    signature = generate()
    code, _ = on_a_terminal(["remove", "open"], ["\x04"])  # end of file
    assert code != 0
    assert keyring.find(signature) is not None
    assert files(home) == ["open.pem", "open.toml"]


def test_remove_deletes_entry_file_and_auth_token_after_a_yes(home: Path, daemon: Running) -> None:
    signature = generate()
    code, seen = on_a_terminal(["remove", "open"], ["y"])
    assert code == 0, seen
    assert keyring.find(signature) is None
    assert not files(home)
    run("remove", "open", "--yes", code=os.EX_USAGE)


def test_remove_asks_before_it_takes_another_programs_auth_token_away(home: Path) -> None:
    path, signature = fresh_key(home / "key.pem")
    run("import", "old", "--file", path, "--compat", word=OLD_WORD)
    (home / "DATA/upcall/keys/old.toml").unlink()
    assert "--yes" in run("remove", signature, code=os.EX_USAGE).stderr
    assert keyring.find(signature) is not None
    code, seen = on_a_terminal(["remove", signature], ["n"])
    assert code == 1 and "Another program put it there" in seen
    assert keyring.find(signature) is not None
    run("remove", signature, "--delete-file", "--yes", code=os.EX_USAGE)
    run("remove", signature, "--yes")
    assert keyring.find(signature) is None


def test_remove_takes_away_what_is_no_auth_token(home: Path) -> None:
    """`upcall doctor` names this command for it."""
    keyring.add_user_key("00112233445566aa", str(home).encode())
    run("remove", "00112233445566aa", "--yes")
    assert keyring.find("00112233445566aa") is None


# --- shared files and signatures -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["path", "hard link", "symbolic link", "copy"])
def test_importing_a_key_twice_is_refused_with_the_name_of_the_first(home: Path, how: str) -> None:
    path, _ = fresh_key(home / "key.pem")
    run("import", "old", "--file", path, word=OLD_WORD)
    again = home / "again.pem"
    if how == "path":
        again = path
    elif how == "hard link":
        again.hardlink_to(path)
    elif how == "symbolic link":
        again.symlink_to(path)
    else:
        again.touch(0o600)
        again.write_bytes(path.read_bytes())
    word = OLD_WORD if how == "copy" else None  # not even asked for otherwise
    refused = run("import", "new", "--file", again, word=word, code=os.EX_CANTCREAT)
    assert "the key old" in refused.stderr and "nothing was imported" in refused.stderr
    assert files(home) == ["old.toml"]


def test_a_file_and_token_of_two_entries_go_with_the_last_of_them(home: Path, daemon: Running) -> None:
    signature = generate("one")
    second_entry("two", "one")
    refused = run("remove", signature, "--yes", code=os.EX_USAGE)
    assert "more than one key has the signature" in refused.stderr and "one, two" in refused.stderr
    refused = run("remove", "one", "--yes", "--delete-file", code=os.EX_USAGE)
    assert "one.pem is also the file of the key two" in refused.stderr
    assert "kept" in run("remove", "one", "--yes").stderr
    assert files(home) == ["one.pem", "two.toml"]
    assert daemon.works(signature)
    run("remove", "two", "--yes", "--delete-file")
    assert not files(home)
    assert keyring.find(signature) is None


def test_a_hard_link_counts_as_the_same_file(home: Path) -> None:
    generate("one")
    store = KeyStore()
    (home / "link.pem").hardlink_to(store.directory / "one.pem")
    other = store.load("one")._replace(name="two", signature="00112233445566aa", path=str(home / "link.pem"))
    store.save(other)
    found = sharing(store, store.load("one"))
    assert (found.same_key, found.same_file) == ((), ("two",))
    run("remove", "one", "--yes")
    assert (store.directory / "one.pem").exists()


def test_a_file_that_a_damaged_entry_may_use_is_kept(home: Path) -> None:
    generate("one")
    damaged = home / "DATA/upcall/keys/two.toml"
    damaged.touch(0o600)
    damaged.write_text("what = 1")
    assert "which the damaged entry two may use" in run("remove", "one", "--yes").stderr
    assert files(home) == ["one.pem", "two.toml"]


@pytest.mark.parametrize("inside", [False, True])
def test_a_file_imported_in_place_is_kept_unless_its_deletion_is_asked_for(home: Path, inside: bool) -> None:
    path, _ = fresh_key(home / "key.pem")
    if inside:
        KeyStore().prepare()
        path = path.rename(home / "DATA/upcall/keys/old.pem")
    run("import", "old", "--file", path, word=OLD_WORD)
    assert f"kept {path}" in run("remove", "old", "--yes").stderr
    assert path.exists()
    run("import", "old", "--file", path, word=OLD_WORD)
    run("remove", "old", "--delete-file", "--yes")
    assert not path.exists()


def test_delete_file_is_refused_for_a_key_without_a_file_and_with_keyring_only(home: Path) -> None:
    run("generate", "words", "--module", "passphrase", "--param", "memory=32", "--param", "passes=2", word="w")
    signature = shown("words")["signature"]
    assert "has no key file" in run("remove", "words", "--delete-file", "--yes", code=os.EX_USAGE).stderr
    run("remove", "words", "--delete-file", "--keyring-only", code=os.EX_USAGE)
    assert keyring.find(signature) is not None
    run("remove", "words", "--yes")
    assert keyring.find(signature) is None


def test_the_auth_token_of_two_entries_without_a_file_goes_with_the_last(home: Path) -> None:
    run("generate", "words", "--module", "passphrase", "--param", "memory=32", "--param", "passes=2", word="w")
    signature = shown("words")["signature"]
    second_entry("more", "words")
    run("remove", "words", "--yes")
    assert keyring.find(signature) is not None
    run("remove", "more", "--yes")
    assert keyring.find(signature) is None


def test_generating_over_the_file_of_another_key_is_refused_with_its_name(home: Path) -> None:
    signature = generate("one")
    run("rename", "one", "two")
    path = shown("two")["path"]
    refused = run("generate", "one", "--bits", "2048", "--no-passphrase", "--path", path, code=os.EX_CANTCREAT)
    assert "is there already, as the file of the key two" in refused.stderr
    assert shown("two")["signature"] == signature
    assert generate("one") != signature
    assert shown("one")["path"].endswith("/one-2.pem")

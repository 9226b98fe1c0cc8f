"""`upcall key backup` and `restore`."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path

import pytest

from tests.fresh_key import WORD as OLD_WORD
from tests.fresh_key import fresh_key
from tests.pinned import PIN
from tests.test_cli_key import WORD, Running, home, on_a_terminal, run, shown
from tests.test_cli_key_modules import GIVEN, pinned
from tests.test_key_changes_killed import files, killed_everywhere, restoring
from tests.test_keys_pem import pbkdf2
from upcall.kernel import keyring
from upcall.keys import backup as format_
from upcall.keys import plugins
from upcall.keys.backup import Cost, Kept, pack_backup
from upcall.keys.store import KeyStore

__all__ = ["home", "pinned"]  # the fixtures

OF_BACKUP = "a word for the backup"
WORDS = ["--module", "passphrase", "--param", "memory=32", "--param", "passes=2"]


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format_.pack_backup, "__defaults__", (Cost(8 * 1024, 1, 1),))


def word(home: Path, name: str, text: str) -> Path:
    path = home / name
    if not path.exists():
        path.touch(0o600)
    path.write_text(text)
    return path


def backed_up(home: Path, *names: str, code: int = 0) -> Path:
    file = home / "keys.backup"
    run(
        "backup",
        *(names or ["--all"]),
        "-o",
        file,
        "--force",
        "--backup-passphrase-file",
        word(home, "b", OF_BACKUP),
        code=code,
    )
    return file


def restored(home: Path, *options: str | Path, code: int = 0, key_word: str = WORD) -> str:
    given = ["--backup-passphrase-file", word(home, "b", OF_BACKUP), "--passphrase-file", word(home, "k", key_word)]
    return run("restore", home / "keys.backup", *options, *map(str, given), code=code).output


def generate(name: str, *options: str) -> str:
    run("generate", name, "--no-add", *(options or ["--module", "x25519"]), word=WORD)
    return str(shown(name)["signature"])


def removed(*names: str) -> None:
    for name in names:
        run("remove", name, "--yes", "--delete-file") if shown(name)["path"] else run("remove", name, "--yes")


def test_keys_come_back_from_a_backup_and_work(home: Path) -> None:
    generate("work")
    generate("rsa", "--bits", "2048")
    generate("words", *WORDS)
    before = {name: KeyStore().load(name) for name in KeyStore().names()}
    file = backed_up(home)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    removed(*before)
    assert not files(home)
    seen = restored(home)
    assert "restored work; `upcall key add work` adds it" in seen
    assert {name: KeyStore().load(name) for name in KeyStore().names()} == before
    assert files(home) == ["rsa.pem", "rsa.toml", "words.toml", "work.pem", "work.toml"]
    running = Running()
    try:
        run("add", "rsa", word=WORD)
        assert running.works(before["rsa"].signature)
    finally:
        running.close()
    assert "work is there already" in restored(home)


def test_a_key_file_of_elsewhere_comes_back_into_upcalls_folder(home: Path) -> None:
    path, signature = fresh_key(home / "key.pem")
    run("import", "old", "--file", path, "--compat", "--no-add", word=OLD_WORD)
    backed_up(home, "old")
    run("remove", "old", "--yes", "--delete-file")
    restored(home, key_word=OLD_WORD)
    told = shown("old")
    assert (told["path"], told["source"]) == (f"{home}/DATA/upcall/keys/old.pem", "compat")
    run("add", "old", word=OLD_WORD)
    run("remove", "old", "--yes")
    assert not files(home)
    assert keyring.find(signature) is None


def test_restore_lists_keys_and_restores_some_or_one_under_another_name(home: Path) -> None:
    first, second = generate("one"), generate("two")
    backed_up(home)
    removed("one", "two")
    listed = json.loads(
        run("restore", home / "keys.backup", "--list", "--json", "--backup-passphrase-file", home / "b").stdout
    )
    assert [(row["name"], row["signature"], row["file"]) for row in listed] == [
        ("one", first, True),
        ("two", second, True),
    ]
    table = run("restore", home / "keys.backup", "--list", "--backup-passphrase-file", home / "b").stdout
    assert table.splitlines()[1].split() == ["one", first, "x25519", "X25519", "ask", "yes"]
    assert not files(home)
    restored(home, "two", "--as", "three")
    assert files(home) == ["three.pem", "three.toml"]
    assert shown("three")["signature"] == second
    assert "no key 'nix'" in restored(home, "nix", code=os.EX_USAGE)
    assert "name the one key" in restored(home, "--as", "x", code=os.EX_USAGE)


def test_restore_refuses_names_in_use_and_keys_that_are_there_under_another_name(home: Path) -> None:
    generate("one")
    backed_up(home)
    run("rename", "one", "two")
    assert "the key two: is the same one as one" in restored(home, code=os.EX_CANTCREAT)
    removed("two")
    generate("one")
    before = KeyStore().load("one")
    assert "already: `upcall key show" in restored(home, code=os.EX_CANTCREAT)
    assert KeyStore().load("one") == before
    restored(home, "one", "--as", "first")


def test_a_restored_key_is_added_at_logins_only_when_that_is_asked_for_again(home: Path) -> None:
    """A backup of another person would have the daemon open its keys."""
    generate("work")
    run("auto", "work")
    backed_up(home)
    removed("work")
    assert "`upcall key auto work` adds it at each login" in restored(home)
    assert not KeyStore().load("work").auto


def test_a_lost_key_file_comes_back_to_its_entry(home: Path) -> None:
    generate("work")
    run("auto", "work")
    before = KeyStore().load("work")
    backed_up(home)
    path = home / "DATA/upcall/keys/work.pem"
    path.unlink()
    assert "wrong passphrase" in restored(home, code=os.EX_DATAERR, key_word="wrong")
    assert files(home) == ["work.toml"]
    assert "restored work" in restored(home)
    assert KeyStore().load("work") == before
    run("add", "work", word=WORD)


def test_a_key_that_cannot_be_restored_leaves_nothing_and_others_come_back(home: Path) -> None:
    path, _ = fresh_key(home / "key.pem")
    run("import", "old", "--file", path, "--no-add", word=OLD_WORD)
    generate("work")
    backed_up(home)
    removed("old", "work")
    seen = restored(home, code=os.EX_DATAERR)
    assert "old was not restored" in seen and "wrong passphrase" in seen
    assert files(home) == ["work.pem", "work.toml"]
    restored(home, key_word=OLD_WORD)
    assert files(home) == ["old.pem", "old.toml", "work.pem", "work.toml"]


def test_passphrases_are_typed_on_the_terminal(home: Path) -> None:
    generate("work")
    file = home / "keys.backup"
    code, seen = on_a_terminal(["backup", "work", "-o", str(file)], [OF_BACKUP, OF_BACKUP])
    assert code == 0, seen
    assert "New passphrase for the backup: \r\nThe same once more: \r\n" in seen
    removed("work")
    code, seen = on_a_terminal(["restore", str(file)], [OF_BACKUP, WORD])
    assert code == 0, seen
    assert "Passphrase of the backup: \r\n" in seen and "Passphrase for the key work: \r\n" in seen
    assert OF_BACKUP not in seen and WORD not in seen


def test_backup_overwrites_no_file_unless_forced(home: Path) -> None:
    generate("work")
    file = word(home, "there", "mine")
    given = ["--backup-passphrase-file", str(word(home, "b", OF_BACKUP))]
    assert "--force" in run("backup", "--all", "-o", file, *given, code=os.EX_CANTCREAT).stderr
    assert file.read_text() == "mine"
    run("backup", "--all", "-o", file, "--force", *given)
    assert file.read_bytes().startswith(b"upcall-backup 1\n")


def test_backup_replaces_no_fifo_and_writes_through_a_link(home: Path) -> None:
    generate("work")
    given = ["--backup-passphrase-file", str(word(home, "b", OF_BACKUP))]
    os.mkfifo(home / "fifo")
    for options in ([], ["--force"]):
        told = run("backup", "--all", "-o", home / "fifo", *options, *given, code=os.EX_OSERR).stderr
        assert "is not a regular file" in told
    assert (home / "fifo").is_fifo()
    (home / "link").symlink_to("target")
    run("backup", "--all", "-o", home / "link", "--force", *given)
    assert (home / "link").is_symlink() and (home / "target").read_bytes().startswith(b"upcall-backup 1\n")
    assert "name a file" in run("backup", "--all", "-o", "-", *given, code=os.EX_USAGE).stderr


def test_backup_names_what_is_not_in_it(home: Path) -> None:
    run("generate", "filed", "--module", "x25519", "--no-add", "--passphrase-file", word(home, "p", WORD))
    generate("typed")
    told = run("backup", "--all", "-o", home / "x", "--backup-passphrase-file", word(home, "b", OF_BACKUP)).stderr
    assert f"filed: its passphrase is in {home}/p, which is not in the backup" in told
    assert "typed: its passphrase is kept nowhere" in told


def test_the_passphrase_of_a_file_is_read_from_there_by_restore(home: Path) -> None:
    run("generate", "filed", "--module", "x25519", "--no-add", "--passphrase-file", word(home, "p", WORD))
    backed_up(home)
    removed("filed")
    run("restore", home / "keys.backup", "--backup-passphrase-file", home / "b")
    assert shown("filed")["source"] == f"file:{home}/p"
    run("add", "filed")


def test_backup_refuses_key_files_that_others_can_read_missing_keys_and_damaged_entries(home: Path) -> None:
    generate("work")
    path = home / "DATA/upcall/keys/work.pem"
    path.chmod(0o644)
    assert "lets others in" in run("backup", "work", "-o", home / "x", code=os.EX_NOPERM).stderr
    path.chmod(0o600)
    run("backup", "nix", "-o", home / "x", code=os.EX_USAGE)
    run("backup", "-o", home / "x", code=os.EX_USAGE)
    run("backup", "work", "--all", "-o", home / "x", code=os.EX_USAGE)
    word(home, "DATA/upcall/keys/bad.toml", "what = 1")
    assert "bad.toml" in run("backup", "--all", "-o", home / "x", code=os.EX_DATAERR).stderr
    assert not (home / "x").exists()


def test_restore_refuses_damaged_files_and_wrong_passphrases_before_anything_is_written(home: Path) -> None:
    generate("work")
    file = backed_up(home)
    removed("work")
    given = ["--backup-passphrase-file", str(word(home, "b", "wrong"))]
    assert "passphrase is wrong" in run("restore", file, *given, code=os.EX_DATAERR).stderr
    file.write_bytes(file.read_bytes()[:-3])
    assert "cut off" in run("restore", file, *given, code=os.EX_DATAERR).stderr
    file.write_bytes(b"PK")
    assert "is no backup" in run("restore", file, *given, code=os.EX_DATAERR).stderr
    os.truncate(file, format_.MAX_BACKUP + 1)
    assert "larger than a backup" in run("restore", file, *given, code=os.EX_OSERR).stderr
    os.mkfifo(home / "fifo")
    assert "not a regular file" in run("restore", home / "fifo", *given, code=os.EX_OSERR).stderr
    run("restore", home / "nix", *given, code=os.EX_NOINPUT)
    assert not files(home)


def test_a_key_in_a_token_comes_back_as_its_entry_and_is_proved_by_its_pin(home: Path) -> None:
    pin = word(home, "pin", PIN.decode())
    run("import", "card", *GIVEN, "--no-add", "--pin-file", pin)
    before = KeyStore().load("card")
    told = run(
        "backup", "card", "-o", home / "keys.backup", "--backup-passphrase-file", word(home, "b", OF_BACKUP)
    ).stderr
    assert "what the token or TPM holds is not in the backup" in told
    run("remove", "card", "--yes")
    restore = ["restore", str(home / "keys.backup"), "--backup-passphrase-file", str(home / "b"), "--pin-file"]
    assert "a wrong PIN" in run(*restore, word(home, "other", "000000"), code=os.EX_DATAERR).stderr
    assert not files(home)
    run(*restore, pin)
    assert KeyStore().load("card") == before


def test_restore_asks_before_it_uses_a_token_that_the_backup_names(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backup of another person could name any library or device; the blob says which, whatever the entry says."""
    pin = word(home, "pin", PIN.decode())
    run("import", "card", *GIVEN, "--no-add", "--pin-file", pin)
    given = ["--backup-passphrase-file", str(word(home, "b", OF_BACKUP)), "--pin-file", str(pin)]
    run("backup", "card", "-o", home / "keys.backup", *given[:2])
    blob = KeyStore().load("card").blob
    run("remove", "card", "--yes")
    real = plugins.available()
    isolated = {alias: found._replace(isolated=True) for alias, found in real.items()}
    monkeypatch.setattr("upcall.cli.keybackup.available", lambda: isolated)
    told = run("restore", home / "keys.backup", *given, code=os.EX_USAGE).stderr
    assert "--yes does it without asking" in told
    assert blob is not None and re.findall(rb"[!-~]{4,}", blob)[0].decode() in told
    assert not files(home)
    run("restore", home / "keys.backup", "--yes", *given)
    assert KeyStore().load("card").blob == blob


def test_a_hostile_backup_with_links_and_paths_writes_nothing_elsewhere(home: Path) -> None:
    """The entry's path is not where the file goes, and a link in the folder is not followed."""
    generate("work")
    store = KeyStore()
    entry, pem = store.load("work"), (home / "DATA/upcall/keys/work.pem").read_bytes()
    removed("work")
    hostile = Kept("work", entry._replace(path=f"{home}/stolen/../victim.pem"), pem, ".pem", None)
    (home / "keys.backup").write_bytes(pack_backup([hostile], bytearray(OF_BACKUP.encode())))
    (store.directory / "work.pem").symlink_to(home / "victim.pem")
    assert "is there already" in restored(home, code=os.EX_CANTCREAT)
    (store.directory / "work.pem").unlink()
    restored(home)
    assert shown("work")["path"] == f"{home}/DATA/upcall/keys/work.pem"
    assert not (home / "victim.pem").exists()


# --- killed ----------------------------------------------------------------------------------------------------


def test_backup_killed_anywhere_leaves_a_whole_file_or_none(home: Path) -> None:
    signature = generate("k")
    given = ["--backup-passphrase-file", str(word(home, "b", OF_BACKUP))]
    (home / "out").mkdir()
    file = home / "out/keys.backup"
    prepare = restoring(home)

    def command() -> None:
        run("backup", "--all", "-o", file, "--force", *given)

    def prepared() -> None:
        prepare()
        for path in file.parent.iterdir():
            path.unlink()

    outcomes = set()
    for _ in killed_everywhere(home, signature, command, prepared):
        outcomes.add(file.exists())
        if file.exists():
            run("restore", file, "--list", *given)
        assert files(home) == ["k.pem", "k.toml"]
    assert outcomes == {True, False}


def test_restore_killed_anywhere_can_be_repeated(home: Path) -> None:
    signature = generate("k")
    before = KeyStore().load("k")
    backed_up(home)
    removed("k")
    word(home, "k", WORD)

    def command() -> None:
        restored(home)

    for _ in killed_everywhere(home / "DATA", signature, command, restoring(home)):
        restored(home)
        assert files(home) == ["k.pem", "k.toml"]
        assert KeyStore().load("k") == before


def test_a_key_file_whose_passphrase_takes_too_long_is_not_restored(home: Path) -> None:
    generate("work")
    entry = KeyStore().load("work")
    removed("work")
    kept = Kept("work", entry, pbkdf2(400_000_000), ".pem", None)
    (home / "keys.backup").write_bytes(pack_backup([kept], bytearray(OF_BACKUP.encode())))
    seen = restored(home, code=os.EX_DATAERR)
    assert seen.startswith(f"upcall: {home}/DATA/upcall/keys/work.pem: its passphrase takes 400000000 rounds, ")
    assert not files(home)

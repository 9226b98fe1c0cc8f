"""`upcall key passwd`, `rename` and `resume`, and PINs from files and descriptors."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tests.fresh_key import WORD as OLD_WORD
from tests.fresh_key import fresh_key
from tests.pinned import PIN
from tests.test_cli_key import WORD, Running, daemon, home, on_a_terminal, run, shown, token_of
from tests.test_cli_key_modules import GIVEN, forget, pinned, secret_file
from upcall.kernel import keyring
from upcall.keys.replacing import leftovers, record_path
from upcall.keys.store import KeyStore
from upcall.process.control import DaemonControl
from upcall.protocols.ecryptfs.authtok import take_auth_tok
from upcall.testing.processes import until

__all__ = ["daemon", "home", "pinned"]  # the fixtures

NEW = "battery staple"


def word(home: Path, name: str, text: str) -> Path:
    path = home / name
    path.touch(0o600)
    path.write_text(text)
    return path


def generate(name: str = "k", *options: str) -> str:
    run("generate", name, "--module", "x25519", *options, word=WORD)
    return str(shown(name)["signature"])


def files(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "DATA/upcall/keys").iterdir())


# --- passwd --------------------------------------------------------------------------------------------------


def test_passwd_asks_for_both_passphrases_and_hands_the_new_one_to_the_daemon(home: Path) -> None:
    run("generate", "k", "--bits", "2048", "--no-add", word=WORD)
    running = Running()
    try:
        run("add", "k", word=WORD)
        signature = shown("k")["signature"]
        before, token = KeyStore().load("k"), token_of(signature)
        code, seen = on_a_terminal(["passwd", "k"], [WORD, NEW, NEW])
        assert code == 0, seen
        assert "Passphrase for the key k: " in seen and "New passphrase for the key k: " in seen
        assert "the passphrase of k is another one now" in seen
        assert WORD not in seen and NEW not in seen
        assert running.works(signature)
        assert (KeyStore().load("k"), token_of(signature)) == (before, token)
        assert files(home) == ["k.pem", "k.toml"]
        assert stat.S_IMODE((home / "DATA/upcall/keys/k.pem").stat().st_mode) == 0o600
        assert "wrong passphrase" in run("add", "k", word=WORD, code=os.EX_DATAERR).stderr
        run("add", "k", word=NEW)
    finally:
        running.close()


def test_passwd_changes_nothing_if_the_present_passphrase_is_wrong_or_the_new_ones_differ(home: Path) -> None:
    generate("k", "--no-add")
    before = (home / "DATA/upcall/keys/k.pem").read_bytes()
    new = word(home, "new", NEW)
    assert "wrong passphrase" in run("passwd", "k", "--new-file", new, word="nonsense", code=os.EX_DATAERR).stderr
    code, seen = on_a_terminal(["passwd", "k"], [WORD, NEW, "other"])
    assert code == os.EX_USAGE and "differ" in seen
    assert (home / "DATA/upcall/keys/k.pem").read_bytes() == before
    assert files(home) == ["k.pem", "k.toml"]


def test_passwd_leaves_a_locked_key_locked(home: Path) -> None:
    run("generate", "k", "--bits", "2048", "--no-add", word=WORD)
    running = Running()
    try:
        run("add", "k", word=WORD)
        signature = shown("k")["signature"]
        run("lock", "k")
        run("passwd", "k", "--new-file", word(home, "new", NEW), "--keep-in", "ask", word=WORD)
        assert not running.works(signature)
        run("unlock", "k", word=NEW)
        assert running.works(signature)
        with DaemonControl() as control:
            control.lock(None)
        run("passwd", "k", "--new-file", word(home, "again", WORD), "--keep-in", "ask", word=NEW)
        assert not running.works(signature)
    finally:
        running.close()


def test_passwd_moves_the_passphrase_to_a_file_and_back(home: Path, daemon: Running) -> None:
    run("generate", "k", "--bits", "2048", word=WORD)
    signature = shown("k")["signature"]
    new = word(home, "new", NEW)
    run("passwd", "k", "--new-file", new, word=WORD)
    assert shown("k")["source"] == f"file:{new}"
    assert take_auth_tok(token_of(signature)).blob == KeyStore().load("k").blob
    assert daemon.works(signature)
    refused = run("passwd", "k", "--new-fd", "0", code=os.EX_USAGE)
    assert f"is in {new}, which stays as it is" in refused.stderr and "--keep-in" in refused.stderr
    run("passwd", "k", "--new-file", word(home, "other", WORD), "--keep-in", "ask")
    assert shown("k")["source"] == "ask"
    assert new.read_text() == NEW
    assert daemon.works(signature)


def test_passwd_removes_and_sets_the_passphrase_of_a_key_file(home: Path) -> None:
    generate("k", "--no-add")
    run("passwd", "k", "--no-passphrase", word=WORD)
    assert shown("k")["source"] == "none"
    run("add", "k")
    new = word(home, "new", NEW)
    run("passwd", "k", "--new-file", new, "--keep-in", "ask")
    assert shown("k")["source"] == "ask"
    run("add", "k", word=NEW)


def test_passwd_of_a_compat_key_makes_its_auth_token_anew(home: Path, daemon: Running) -> None:
    path, signature = fresh_key(home / "key.pem")
    run("import", "old", "--file", path, "--compat", word=OLD_WORD)
    run("passwd", "old", "--new-file", word(home, "new", NEW), word=OLD_WORD)
    told = take_auth_tok(token_of(signature)).blob
    assert NEW.encode() in told and OLD_WORD.encode() not in told
    assert shown("old")["source"] == "compat"
    assert daemon.works(signature)
    assert sorted(path.name for path in home.glob("*.pem")) == ["key.pem"]


def test_passwd_replaces_the_file_behind_a_symbolic_link(home: Path) -> None:
    link = home / "link.pem"
    link.symlink_to(fresh_key(home / "key.pem").path)
    run("import", "old", "--file", link, "--no-add", word=OLD_WORD)
    run("passwd", "old", "--new-file", word(home, "new", NEW), "--keep-in", "ask", word=OLD_WORD)
    assert link.is_symlink() and not (home / "key.pem").is_symlink()
    run("add", "old", word=NEW)


def test_passwd_refuses_a_key_file_that_others_can_read(home: Path) -> None:
    generate("k", "--no-add")
    path = home / "DATA/upcall/keys/k.pem"
    path.chmod(0o640)
    refused = run("passwd", "k", "--new-file", word(home, "new", NEW), word=WORD, code=os.EX_NOPERM)
    assert "mode 0640 lets others in" in refused.stderr
    new = word(home, "open", NEW)
    new.chmod(0o604)
    path.chmod(0o600)
    assert "0604" in run("passwd", "k", "--new-file", new, word=WORD, code=os.EX_NOPERM).stderr
    assert files(home) == ["k.pem", "k.toml"]


def test_passwd_of_a_key_that_is_made_of_its_passphrase_is_refused_with_what_to_do(home: Path) -> None:
    options = ["--module", "passphrase", "--param", "memory=32", "--param", "passes=2", "--no-add"]
    run("generate", "words", *options, word=WORD)
    refused = run("passwd", "words", word=WORD, code=os.EX_USAGE)
    assert "upcall key generate NEW --module passphrase" in refused.stderr
    assert "upcall ecryptfs rewrap -r FOLDER --to NEW" in refused.stderr


def test_passwd_refuses_options_that_contradict_each_other(home: Path) -> None:
    generate("k", "--no-add")
    run("passwd", "k", "--new-fd", "0", "--no-passphrase", code=os.EX_USAGE)
    run("passwd", "k", "--keep-in", "ask", "--no-passphrase", word=WORD, code=os.EX_USAGE)
    refused = run("passwd", "k", "--passphrase-fd", "0", "--new-fd", "0", code=os.EX_USAGE)
    assert "--passphrase-fd reads this descriptor to its end" in refused.stderr


def test_passwd_refuses_a_file_that_two_entries_share(home: Path) -> None:
    generate("one", "--no-add")
    KeyStore().save(KeyStore().load("one")._replace(name="two"))
    refused = run("passwd", "one", "--new-file", word(home, "new", NEW), word=WORD, code=os.EX_USAGE)
    assert "is also the file of the key two" in refused.stderr


# --- what is left of an interrupted command ------------------------------------------------------------------


def test_a_damaged_record_is_reported_and_stops_only_its_own_key(home: Path) -> None:
    generate("k", "--no-add")
    generate("other", "--no-add")
    record = record_path(KeyStore(), "k")
    record.touch(0o600)
    record.write_text("{}")
    assert [left.name for left in leftovers(KeyStore())] == ["k"]
    assert "is damaged" in run("resume", code=os.EX_TEMPFAIL).stderr
    assert "is damaged" in run("passwd", "k", word=WORD, code=os.EX_DATAERR).stderr
    assert "cannot be resumed" in run("rename", "other", "more").stderr
    assert record.exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [("staged", "/etc/.k.pem.00112233aabb"), ("staged", "k.pem"), ("path", "/etc/passwd"), ("ready", 1), ("x", "y")],
)
def test_a_record_with_foreign_paths_or_fields_is_refused(home: Path, field: str, value: object) -> None:
    import json

    from upcall.core.errors import PeerError
    from upcall.keys.replacing import Replacement, read_record

    generate("k", "--no-add")
    store = KeyStore()
    Replacement(store, store.load("k")).begin()
    path = record_path(store, "k")
    assert read_record(store, "k") is not None
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(PeerError, match="is damaged"):
        read_record(store, "k")


# --- rename ----------------------------------------------------------------------------------------------------


def test_rename_keeps_signature_token_and_file(home: Path, daemon: Running) -> None:
    run("generate", "k", "--bits", "2048", "--no-passphrase")
    until(lambda: shown("k")["state"] == "open", "the daemon has opened it")
    before = shown("k")
    assert run("rename", "k", "new").stdout == "k is new now\n"
    assert {**shown("new"), "name": "k"} == before
    assert daemon.works(before["signature"])
    assert "no key 'k'" in run("show", "k", code=os.EX_USAGE).stderr
    assert run("rename", before["signature"], "third").stdout == "new is third now\n"
    run("remove", "third", "--yes")
    assert not files(home)


def test_rename_refuses_names_in_use_invalid_names_and_missing_keys(home: Path) -> None:
    for name in ("one", "two"):
        run("generate", name, "--module", "x25519", "--no-passphrase", "--no-add")
    assert "already" in run("rename", "one", "two", code=os.EX_CANTCREAT).stderr
    assert "cannot be the name" in run("rename", "one", "../x", code=os.EX_USAGE).stderr
    run("rename", "nix", "new", code=os.EX_USAGE)
    assert files(home) == ["one.pem", "one.toml", "two.pem", "two.toml"]


# --- PINs from files and descriptors ---------------------------------------------------------------------------


def test_a_pin_is_read_from_a_file_or_descriptor(home: Path) -> None:
    pin = word(home, "pin", PIN.decode() + "\n")
    given = ["--param-file", f"admin={secret_file(home)}", "--pin-file", str(pin)]
    run("generate", "card", *GIVEN, *given)
    try:
        run("add", "card", "--pin-file", pin)
        reader, writer = os.pipe()
        os.write(writer, PIN)
        os.close(writer)
        run("add", "card", "--pin-fd", str(reader))
        os.close(reader)
    finally:
        forget("card")


def test_a_wrong_pin_in_a_file_is_tried_once(home: Path) -> None:
    pin = word(home, "pin", "314159")
    refused = run("import", "card", *GIVEN, "--pin-file", pin, code=os.EX_DATAERR)
    assert "a wrong PIN" in refused.stderr and "314159" not in refused.output
    pin.chmod(0o644)
    assert "0644" in run("import", "card", *GIVEN, "--pin-file", pin, code=os.EX_NOPERM).stderr
    run("import", "card", *GIVEN, "--pin-file", pin, "--pin-fd", "0", code=os.EX_USAGE)
    run("unlock", "--pin-file", pin, code=os.EX_USAGE)
    assert keyring.find("card") is None

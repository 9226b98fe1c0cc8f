"""`upcall key` with a key module that needs parameters, secrets and PINs, or that breaks its contract."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pinned import ADMIN, PIN
from tests.test_cli_key import Running, home, on_a_terminal, run, shown, token_of
from upcall.kernel import keyring

__all__ = ["home"]  # the fixture

GIVEN = ["--module", "pinned", "--param", "label=x"]


@pytest.fixture(autouse=True)
def pinned(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed, for this process and those that it starts."""
    info = home / "site" / "pinned-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pinned\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[upcall.key_modules]\npinned = tests.pinned:module\n")
    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.syspath_prepend(home / "site")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(home / "site"), str(Path(__file__).parents[1])]))


def secret_file(home: Path, word: str = ADMIN) -> Path:
    path = home / "admin"
    path.touch(0o600)
    path.write_text(word + "\n")
    return path


def forget(name: str) -> None:
    """The key's blob names no folder by which the fixture could find it."""
    serial = keyring.find(shown(name)["signature"])
    if serial is not None:
        keyring.unlink(serial)


def typed(*arguments: str, pins: tuple[str, ...] = (PIN.decode(),)) -> str:
    code, seen = on_a_terminal(list(arguments), list(pins))
    assert code == 0, seen
    assert PIN.decode() not in seen
    return seen


def test_a_key_with_a_pin_is_generated_shown_added_and_removed(home: Path) -> None:
    seen = typed("generate", "card", *GIVEN, "--param", "size=16", "--param-file", f"admin={secret_file(home)}")
    assert "upcall: touch the card\r\nPIN of the card: \r\n" in seen
    assert "passphrase" not in seen
    told = shown("card")
    try:
        assert (told["module"], told["source"], told["description"]) == ("pinned", "none", "pinned x")
        assert told["parameters"] == {"label": "x", "size": "16", "note": "", "fault": "none"}
        entry = (home / "DATA/upcall/keys/card.toml").read_text()
        assert ADMIN not in entry
        before = token_of(told["signature"])
        run("remove", "card", "--keyring-only")
        assert not shown("card")["in_keyring"]
        typed("add", "card")
        assert token_of(told["signature"]) == before
        assert "parameters     label=x, size=16, note=, fault=none" in run("show", "card").stdout
        code, seen = on_a_terminal(["export-public", "card"], [PIN.decode()])
        assert code == os.EX_USAGE
        assert "the keys of 'pinned' have no public half" in seen
    finally:
        forget("card")
    run("remove", "card", "--yes")
    assert not list((home / "DATA/upcall/keys").iterdir())


def test_a_secret_parameter_is_asked_on_the_terminal_without_echo() -> None:
    seen = typed("generate", "card", *GIVEN, "--no-add", pins=(ADMIN, PIN.decode()))
    assert "The administrator's word: \r\n" in seen
    assert ADMIN not in seen
    seen = typed("generate", "other", *GIVEN, "--no-add", "--param", "admin", pins=(ADMIN, PIN.decode()))
    assert "The administrator's word: \r\n" in seen


def test_a_secret_parameter_is_read_from_a_descriptor() -> None:
    reader, writer = os.pipe()
    os.write(writer, ADMIN.encode())
    os.close(writer)
    os.set_inheritable(reader, True)
    try:
        seen = typed("generate", "card", *GIVEN, "--no-add", "--param-fd", f"admin={reader}")
    finally:
        os.close(reader)
    assert "administrator" not in seen


def test_without_a_terminal_secrets_that_are_not_given_are_an_error(home: Path) -> None:
    """A new session has no terminal, even if the tests run on one."""
    command = [
        sys.executable,
        "-X",
        "upcall-environment",
        "-c",
        "from upcall.cli import main; main()",
        "key",
        "generate",
        "card",
        *GIVEN,
    ]
    for given, why in (
        ([], "(The administrator's word): use --param-fd or --param-file"),
        (["--param-file", f"admin={secret_file(home)}"], "(PIN of the card): use --pin-fd or --pin-file"),
    ):
        done = subprocess.run([*command, *given], start_new_session=True, capture_output=True, text=True, timeout=60)
        assert done.returncode == os.EX_USAGE
        assert f"no terminal to ask on {why}\n" in done.stderr
    assert not list((home / "DATA/upcall/keys").iterdir())


def test_a_wrong_pin_is_an_error_and_makes_no_key(home: Path) -> None:
    code, seen = on_a_terminal(["generate", "card", *GIVEN, "--param-file", f"admin={secret_file(home)}"], ["31415"])
    assert code == os.EX_DATAERR
    assert "a wrong PIN" in seen
    assert "31415" not in seen
    assert not list((home / "DATA/upcall/keys").iterdir())


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--param", "bits=1"], "no parameter 'bits': label, size, admin, note, fault can be given here"),
        (["--bits", "1"], "no parameter 'bits': label, size, admin, note, fault can be given here"),
        (["--param", "label=y"], "given twice"),
        (["--param", "size=17"], "size=17: 16, 32 can be chosen"),
        (["--param", f"admin={ADMIN}"], "'admin' is a secret, which others would see"),
        (["--param", "=1"], "NAME=... is needed"),
        (["--param-fd", "admin"], "--param-fd admin: NAME=... is needed"),
        (["--param-fd", "admin=x"], "a descriptor's number is needed"),
        (["--param", "admin", "--param-fd", "admin=0"], "given twice"),
        (["--passphrase-file", "/x"], "the keys of 'pinned' have no passphrase"),
        (["--no-passphrase", "--passphrase-keyring"], "goes with no other passphrase option"),
    ],
)
def test_invalid_parameters_are_refused_with_a_reason_and_no_secret_is_shown(
    home: Path, arguments: list[str], why: str
) -> None:
    admin = [] if any("admin" in one for one in arguments) else ["--param-file", f"admin={secret_file(home)}"]
    result = run("generate", "card", *GIVEN, *admin, *arguments, code=os.EX_USAGE)
    assert why in result.stderr
    assert ADMIN not in result.output
    assert not (home / "DATA/upcall/keys/card.toml").exists()


def test_a_missing_required_parameter_is_a_usage_error() -> None:
    for command in (["generate", "card", "--param", "admin"], ["import", "card"]):
        result = run(*command, "--module", "pinned", code=os.EX_USAGE)
        assert "the parameter 'label' must be given: What it is called." in result.stderr


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("clear", "of 16 bytes it left what it should wrap in clear"),
        ("garbage", "this key did not wrap it"),
        ("long", "of 1 bytes it made 513, 1 to 512 are possible"),
        ("short", "of 1 bytes it made 0, 1 to 512"),
        ("text", "of 1 bytes it made no bytes but str"),
        ("other", "it unwrapped something else"),
    ],
)
def test_a_generated_key_that_fails_its_trial_is_removed(home: Path, fault: str, why: str) -> None:
    admin = f"admin={secret_file(home)}"
    arguments = ["generate", "card", *GIVEN, "--param-file", admin, "--param", f"fault={fault}"]
    code, seen = on_a_terminal(arguments, [PIN.decode()])
    assert code == os.EX_DATAERR
    assert why in seen.replace("\r\n", "")
    assert not list((home / "DATA/upcall/keys").iterdir())


def test_a_module_without_key_files_imports_without_a_file_and_refuses_one(home: Path) -> None:
    typed("import", "card", *GIVEN)
    told = shown("card")
    try:
        assert (told["path"], told["source"], told["parameters"]) == (None, "none", {"label": "x"})
        assert "key file" not in typed("add", "card")
        code, seen = on_a_terminal(["remove", "card"], ["n"])
        assert code == 1 and "Its entry says how the key is found" in seen
    finally:
        forget("card")
    code, seen = on_a_terminal(["import", "other", *GIVEN, "--file", "/etc/passwd"], [])
    assert code == os.EX_DATAERR
    assert "a file is no use to me" in seen


def test_generate_and_import_refuse_a_module_that_cannot_do_it(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    info = home / "site" / "toy-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[upcall.key_modules]\ntoy = upcall.testing.toy:TOY\n")
    assert "makes no keys" in run("generate", "--module", "toy", code=os.EX_USAGE).stderr
    assert "takes in no keys" in run("import", "x", "--module", "toy", code=os.EX_USAGE).stderr


# --- with passphrases ------------------------------------------------------------------------------------------


def test_unlock_makes_locked_keys_work_with_the_right_passphrase_only(home: Path) -> None:
    running = Running()
    try:
        run("generate", "--bits", "2048", word="correct horse")
        run("generate", "open", "--param", "bits=2048", "--no-passphrase")
        one, two = shown("default")["signature"], shown("open")["signature"]
        before = keyring.find(one)
        run("lock")
        assert not running.works(one)
        assert not running.works(two)
        wrong = run("unlock", "default", word="nonsense", code=os.EX_DATAERR)
        assert "wrong passphrase" in wrong.stderr
        assert not running.works(one)
        assert run("unlock", one, word="correct horse").stdout == f"{one} is unlocked\n"
        again = run("unlock", one, word="correct horse").stdout
        assert again == f"{one} was not locked; the daemon has 1 passphrase now\n"
        assert running.works(one)
        assert run("unlock", "open").stdout == "open is unlocked\n"
        assert run("unlock", "open").stdout == "open was not locked\n"
        assert json.loads(run("unlock", "open", "--json").stdout) == {"all": False, "unlocked": []}
        assert running.works(two)
        assert keyring.find(one) == before
        run("lock")
        assert "NAME is required" in run("unlock", word="correct horse", code=os.EX_USAGE).stderr
        code, seen = on_a_terminal(["unlock"], ["correct horse"])
        assert code == 0, seen
        assert "all keys are unlocked" in seen
        assert running.works(one)
        assert running.works(two)
        run("remove", "default", "--keyring-only")
        assert "use `upcall key add default`" in run("unlock", "default", code=os.EX_USAGE).stderr
    finally:
        running.close()


def test_unlock_without_a_daemon_is_an_error() -> None:
    assert "no daemon" in run("unlock", code=os.EX_UNAVAILABLE).stderr


def test_export_public_prints_the_public_key_only_with_the_right_passphrase(home: Path) -> None:
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    run("generate", "--bits", "2048", "--no-add", word="correct horse")
    pem = run("export-public", word="correct horse").stdout
    assert pem.startswith("-----BEGIN PUBLIC KEY-----\n")
    load_pem_public_key(pem.encode())
    assert "wrong passphrase" in run("export-public", "default", word="x", code=os.EX_DATAERR).stderr


def test_list_and_show_print_the_same_json() -> None:
    run("generate", "open", "--bits", "2048", "--no-add", "--no-passphrase")
    (row,) = (one for one in json.loads(run("list", "--json").stdout) if one["name"] == "open")
    assert row == shown("open")
    assert row["parameters"] == {"bits": "2048"}


def test_a_key_entry_is_readable_by_its_owner_only(home: Path) -> None:
    run("generate", "open", "--bits", "2048", "--no-add", "--no-passphrase")
    assert (home / "DATA/upcall/keys/open.toml").stat().st_mode & 0o777 == 0o600

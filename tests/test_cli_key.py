"""`upcall key`, with the kernel's own keyring, a real terminal, and the daemon's control socket and key service."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from upcall.cli import exit_code, main
from upcall.core.errors import ModuleFailed, PeerError, Refused, UsageError
from upcall.core.messages import Requester
from upcall.daemon.control import Control
from upcall.daemon.passphrase_sources import fetch
from upcall.daemon.secrets import NoPrompter
from upcall.kernel import keyring
from upcall.keys.keyring_backend import unusable
from upcall.keys.passphrase import NoPassphrase
from upcall.keys.plugins import load
from upcall.process.paths import daemon_socket
from upcall.protocols.ecryptfs import packets as wire
from upcall.protocols.ecryptfs.authtok import take_auth_tok
from upcall.protocols.ecryptfs.key_handler import KeyHandler
from upcall.wire.envelope import Envelope

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "vectors" / "ecryptfs.json").read_text())
KEY = VECTORS["keys"]["root"]
WORD = "correct horse"

BACKEND = """
import json, pathlib
from keyring.backend import KeyringBackend
from keyring.errors import KeyringLocked
FILE = pathlib.Path(__file__).with_name("kept.json")

class Backend(KeyringBackend):
    priority = 1

    def get_password(self, service, username):
        return json.loads(FILE.read_text()).get(service + "/" + username) if FILE.exists() else None

    def set_password(self, service, username, password):
        if FILE.with_name("locked").exists():
            raise KeyringLocked("somebody said no")
        FILE.write_text(json.dumps({service + "/" + username: password}))
"""


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folders of our own, with names short enough for a socket; and what was added to the user keyring goes."""
    folder = Path(tempfile.mkdtemp())
    for name in ("DATA", "CONFIG", "RUNTIME"):
        (folder / name).mkdir(0o700)
        monkeypatch.setenv(f"XDG_{name}_{'DIR' if name == 'RUNTIME' else 'HOME'}", str(folder / name))
    try:
        yield folder
    finally:
        for key in keyring.list_user_keyring():
            if str(folder).encode() in _payload(key):
                keyring.unlink(key.serial)
        shutil.rmtree(folder)


def _payload(key: keyring.KeyDescription) -> bytes:
    try:
        return keyring.read(key.serial) if key.type == "user" else b""
    except OSError:
        return b""


class Running:
    """A daemon, as far as `upcall key` can tell: its socket and its keys, without a broker."""

    def __init__(self) -> None:
        self.keys = KeyHandler(keyring, {"openssl": lambda: load("upcall_rsa:module")}, fetch)
        self._control = Control(daemon_socket(), self.keys.cache, self.keys.warm, NoPrompter().attach)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while not self._stop.is_set():
            if select.select([self._control.listener], [], [], 0.05)[0]:
                self._control.serve_one()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(60)
        self._control.close()

    def works(self, signature: str) -> bool:
        """Wraps a file's key and unwraps it, as the kernel would have it; False if the key is locked."""
        clear = wire.pack_file_key(wire.FileKey(wire.CIPHER_AES_128, os.urandom(16)))
        try:
            wrapped = wire.take_reply(self._answer(wire.Ask(wire.TAG_66, signature, clear))).content
        except Refused as error:
            assert error.reason == "locked"
            return False
        return wire.take_reply(self._answer(wire.Ask(wire.TAG_64, signature, wrapped))).content == clear

    def _answer(self, ask: wire.Ask) -> bytes:
        return self.keys.answer(Envelope(1, 1, "ecryptfs", Requester(0, 0), 0, wire.pack_ask(ask)))


@pytest.fixture
def daemon() -> Iterator[Running]:
    running = Running()
    yield running
    running.close()


def run(*arguments: str | Path, word: str | None = None, code: int = 0, answer: str = "") -> Result:
    """`upcall key`, with the passphrase on a descriptor if there is one."""
    told = ["key", *map(str, arguments)]
    reader, writer = os.pipe()
    if word is not None:
        os.write(writer, word.encode() + b"\n")
        told += ["--passphrase-fd", str(reader)]
    os.close(writer)
    try:
        result = CliRunner().invoke(main, told, input=answer)
    finally:
        os.close(reader)
    assert result.exit_code == code, result.output
    assert WORD not in result.output
    return result


def shown(name: str) -> dict[str, Any]:
    told = json.loads(run("show", name, "--json").stdout)
    assert isinstance(told, dict)
    return told


def word_file(home: Path, word: str = WORD) -> Path:
    path = home / "word"
    path.touch(0o600)
    path.write_text(word)
    return path


def captured_pem(home: Path) -> Path:
    path = home / "key.pem"
    path.touch(0o600)
    path.write_text(KEY["pem"])
    return path


def token_of(signature: str) -> bytes:
    serial = keyring.find(signature)
    assert serial is not None
    return keyring.read(serial)


# --- generate -----------------------------------------------------------------------------------------------


def test_generate_prints_mount_options_and_enrols_a_working_key(home: Path, daemon: Running) -> None:
    result = run("generate", "--bits", "2048", word=WORD)
    told = shown("default")
    signature = told["signature"]
    options = f"ecryptfs_sig={signature},ecryptfs_cipher=aes,ecryptfs_key_bytes=16"
    assert result.stdout.splitlines() == [
        f"signature      {signature}",
        f"key file       {home}/DATA/upcall/keys/default.pem",
        f"mount options  {options}",
        f"mount -i -t ecryptfs -o {options} LOWER UPPER",
    ]
    assert not result.stderr
    assert told["in_keyring"] is True
    assert (told["source"], told["description"], told["mount_options"]) == ("ask", "RSA-2048", options)
    assert WORD.encode() not in token_of(signature)
    assert daemon.works(signature)


def test_generate_without_a_daemon_succeeds_with_a_note() -> None:
    result = run("generate", "--bits", "2048", word=WORD)
    assert "note: nothing is decrypted without a daemon: start it: `upcall daemon`, " in result.stderr
    assert "and `upcall key unlock default` asks for the passphrase again" in result.stderr


def test_generate_makes_rsa_3072_by_default() -> None:
    run("generate", "--no-add", word=WORD)
    assert shown("default")["description"] == "RSA-3072"
    assert shown("default")["in_keyring"] is False


def test_generate_with_a_passphrase_file_records_it_as_the_source(home: Path, daemon: Running) -> None:
    run("generate", "filed", "--bits", "2048", "--passphrase-file", word_file(home))
    assert shown("filed")["source"] == f"file:{home}/word"
    assert daemon.works(shown("filed")["signature"])


def test_a_key_generated_without_a_passphrase_works(daemon: Running) -> None:
    run("generate", "open", "--bits", "2048", "--no-passphrase")
    assert shown("open")["source"] == "none"
    assert daemon.works(shown("open")["signature"])


def test_a_key_file_at_a_chosen_path_survives_removal_of_its_entry(home: Path) -> None:
    run("generate", "--bits", "2048", "--path", home / "else.pem", word=WORD)
    assert shown("default")["path"] == f"{home}/else.pem"
    run("remove", "default", "--yes")
    assert (home / "else.pem").exists()


def test_generate_refuses_invalid_names_options_and_existing_keys() -> None:
    assert "RSA" not in run("generate", "a/b", word=WORD, code=os.EX_USAGE).stdout
    wrong_size = run("generate", "--bits", "1024", word=WORD, code=os.EX_USAGE)
    assert "bits=1024: 2048, 3072, 4096 can be chosen" in wrong_size.stderr
    assert "no key module 'nix'" in run("generate", "--module", "nix", word=WORD, code=os.EX_USAGE).stderr
    assert "1 to 1024 bytes" in run("generate", word="", code=os.EX_USAGE).stderr
    run("generate", "--bits", "2048", "--no-add", word=WORD)
    assert "already" in run("generate", word=WORD, code=os.EX_CANTCREAT).stderr
    both = run("generate", "two", "--passphrase-file", "x", "--passphrase-keyring", code=os.EX_USAGE)
    assert "goes with no other" in both.stderr


def test_generate_refuses_a_passphrase_file_that_others_can_read(home: Path) -> None:
    path = word_file(home)
    path.chmod(0o644)
    result = run("generate", "--passphrase-file", path, code=os.EX_NOPERM)
    assert f"{path}: mode 0644 lets others in" in result.stderr
    assert not (home / "DATA/upcall/keys/default.pem").exists()


# --- add ----------------------------------------------------------------------------------------------------


def test_add_restores_a_key_to_the_keyring_only_with_the_right_passphrase(daemon: Running) -> None:
    run("generate", "--bits", "2048", word=WORD)
    signature = shown("default")["signature"]
    run("remove", "default", "--keyring-only")
    assert shown("default")["in_keyring"] is False
    assert "wrong passphrase" in run("add", word="nonsense", code=os.EX_DATAERR).stderr
    assert signature in run("add", word=WORD).stdout
    assert daemon.works(signature)


def test_add_asks_for_no_passphrase_if_it_is_in_a_file_or_absent(home: Path, daemon: Running) -> None:
    run("generate", "filed", "--bits", "2048", "--no-add", "--passphrase-file", word_file(home))
    run("generate", "open", "--bits", "2048", "--no-add", "--no-passphrase")
    for name in ("filed", "open"):
        run("add", name)
        assert daemon.works(shown(name)["signature"])


def test_a_key_of_ecryptfs_utils_is_imported_and_works(home: Path, daemon: Running) -> None:
    run("import", "old", "--file", captured_pem(home), word=KEY["passphrase"])
    told = shown("old")
    assert (told["signature"], told["source"], told["path"]) == (KEY["sig"], "ask", f"{home}/key.pem")
    assert KEY["passphrase"].encode() not in token_of(KEY["sig"])
    assert daemon.works(KEY["sig"])


def test_import_with_compat_makes_the_auth_token_of_mount_ecryptfs(home: Path, daemon: Running) -> None:
    """Byte for byte the auth token that mount.ecryptfs made, but for the path."""
    path = captured_pem(home)
    run("import", "old", "--file", path, "--compat", word=KEY["passphrase"])
    assert shown("old")["source"] == "compat"
    captured = bytes.fromhex(VECTORS["auth_tok"]["hex"])
    longer = len(str(path)) - len(VECTORS["auth_tok"]["path"])
    ours, theirs = take_auth_tok(token_of(KEY["sig"])), take_auth_tok(captured)
    old_path = VECTORS["auth_tok"]["path"].encode()
    expected = theirs.blob.replace(old_path, str(path).encode())
    expected = (int.from_bytes(expected[:2], sys.byteorder) + longer).to_bytes(2, sys.byteorder) + expected[2:]
    assert ours == theirs._replace(blob=expected)
    assert daemon.works(KEY["sig"])
    run("remove", "old", "--keyring-only")
    run("add", "old", word=KEY["passphrase"])
    assert take_auth_tok(token_of(KEY["sig"])) == ours


def test_add_and_import_refuse_missing_unsafe_and_existing_keys(home: Path) -> None:
    path = captured_pem(home)
    assert "no key 'default'" in run("add", code=os.EX_USAGE).stderr
    assert "No such file" in run("import", "x", "--file", home / "none", code=os.EX_NOINPUT).stderr
    assert "from a file" in run("import", "x", code=os.EX_USAGE).stderr
    path.chmod(0o644)
    assert "mode 0644" in run("import", "x", "--file", path, word="x", code=os.EX_NOPERM).stderr
    path.chmod(0o600)
    run("import", "old", "--file", path, word=KEY["passphrase"])
    assert "already" in run("import", "old", "--file", path, word=KEY["passphrase"], code=os.EX_CANTCREAT).stderr


def test_add_refuses_a_key_file_that_holds_another_key() -> None:
    run("generate", "one", "--bits", "2048", "--no-add", "--no-passphrase")
    run("generate", "two", "--bits", "2048", "--no-add", "--no-passphrase")
    Path(shown("one")["path"]).replace(shown("two")["path"])
    assert "holds the key" in run("add", "two", code=os.EX_DATAERR).stderr


def test_a_quiet_generate_prints_no_summary(home: Path) -> None:
    words = ["--quiet", "key", "generate", "quiet", "--bits", "2048", "--no-passphrase"]
    result = CliRunner().invoke(main, words)
    assert (result.exit_code, result.output) == (0, "")
    assert shown("quiet")["path"] == str(home / "DATA/upcall/keys/quiet.pem")


# --- list, show, remove, lock -------------------------------------------------------------------------------


def test_list_shows_enrolled_keys_and_keyring_tokens_without_an_entry(home: Path) -> None:
    run("generate", "open", "--bits", "2048", "--no-add", "--no-passphrase")
    run("import", "old", "--file", captured_pem(home), "--compat", word=KEY["passphrase"])
    result = run("list")
    assert KEY["passphrase"] not in result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["NAME", "SIGNATURE", "STATE", "MODULE", "KIND", "PASSPHRASE", "AUTO"]
    assert lines[1] == ["old", KEY["sig"], "no", "daemon", "openssl", "RSA-2048", "compat", "no"]
    assert lines[2] == ["open", shown("open")["signature"], "not", "added", "openssl", "RSA-2048", "none", "no"]
    (home / "DATA/upcall/keys/old.toml").unlink()
    told = {row["signature"]: row for row in json.loads(run("list", "--json").stdout)}
    assert told[KEY["sig"]]["name"] is None
    assert told[KEY["sig"]]["module"] == "openssl"
    assert shown(KEY["sig"]) == told[KEY["sig"]]
    run("remove", KEY["sig"], "--yes")
    assert keyring.find(KEY["sig"]) is None


def test_list_reports_a_broken_entry_and_shows_the_others(home: Path) -> None:
    run("generate", "open", "--bits", "2048", "--no-add", "--no-passphrase")
    broken = home / "DATA/upcall/keys/broken.toml"
    broken.touch(0o600)
    broken.write_text("what = 1")
    result = run("list", code=os.EX_DATAERR)
    assert f"{broken}: unknown key 'what'" in result.stderr
    assert "open" in result.stdout
    assert "unknown key" in run("show", "broken", code=os.EX_DATAERR).stderr


def test_show_finds_a_key_by_name_or_signature() -> None:
    run("generate", "open", "--bits", "2048", "--no-add", "--no-passphrase")
    told = dict(line.split(maxsplit=1) for line in run("show", "open").stdout.splitlines())
    assert (told["name"], told["source"]) == ("open", "none")
    assert "in keyring     no" in run("show", told["signature"]).stdout


def test_lock_stops_a_key_until_it_is_added_again(daemon: Running) -> None:
    run("generate", "--bits", "2048", word=WORD)
    signature = shown("default")["signature"]
    assert daemon.works(signature)
    assert run("lock", "default").stdout == "default is locked\n"
    assert not daemon.works(signature)
    run("add", word=WORD)
    assert daemon.works(signature)
    assert run("lock").stdout == "all keys are locked\n"
    assert re.fullmatch(r"all keys are locked already, since \d\d:\d\d\n", run("lock").stdout)
    assert run("lock", "--quiet").stdout == ""
    assert not daemon.works(signature)
    assert "no key 'other'" in run("lock", "other", code=os.EX_USAGE).stderr


def test_lock_and_unlock_speak_of_all_keys_and_not_of_those_that_were_open(daemon: Running) -> None:
    run("generate", "one", "--bits", "2048", "--no-passphrase")
    run("generate", "two", "--bits", "2048", "--no-passphrase")
    assert run("lock").stdout == "all keys are locked\n"
    assert {row["state"] for row in json.loads(run("list", "--json").stdout)} == {"locked"}
    assert run("unlock").stdout == "all keys are unlocked\n"


def test_unlock_without_a_terminal_unlocks_what_it_can_and_names_the_command_for_the_rest(daemon: Running) -> None:
    run("generate", "asked", "--bits", "2048", word=WORD)
    run("generate", "open", "--bits", "2048", "--no-passphrase")
    run("lock")
    command = [sys.executable, "-c", "from upcall.cli import main; main()", "unlock"]
    done = subprocess.run(command, start_new_session=True, capture_output=True, text=True, timeout=120)
    assert done.returncode == os.EX_USAGE
    assert done.stderr == (
        "upcall: no terminal to ask on (Passphrase for the key asked): "
        "use `upcall unlock asked --passphrase-file FILE`\n"
    )
    assert daemon.works(shown("open")["signature"])
    assert shown("asked")["state"] == "locked"


# --- remedies ---------------------------------------------------------------------------------------------------


def test_a_missing_key_names_the_command_that_helps(home: Path) -> None:
    assert "`upcall key generate` makes one" in run("show", "default", code=os.EX_USAGE).stderr
    run("generate", "work", "--module", "x25519", "--no-add", "--no-passphrase")
    assert "did you mean 'work'?" in run("show", "wrok", code=os.EX_USAGE).stderr
    assert "`upcall key list` shows yours" in run("show", "xyz", code=os.EX_USAGE).stderr


def test_a_name_in_use_is_refused_with_the_key_and_commands(home: Path) -> None:
    run("generate", "work", "--module", "x25519", "--no-add", "--no-passphrase")
    text = run("generate", "work", "--no-passphrase", code=os.EX_CANTCREAT).stderr
    assert text == (
        "upcall: there is a key 'work' already: `upcall key show work` shows it, `upcall key remove work` deletes it\n"
    )


def test_generate_without_a_terminal_names_no_passphrase_too(home: Path) -> None:
    command = [sys.executable, "-c", "from upcall.cli import main; main()", "key", "generate"]
    done = subprocess.run(command, start_new_session=True, capture_output=True, text=True, timeout=120)
    assert done.returncode == os.EX_USAGE
    assert "use --passphrase-fd, --passphrase-file or --no-passphrase" in done.stderr


def test_an_empty_new_passphrase_is_refused_with_the_option_for_none(home: Path) -> None:
    code, seen = on_a_terminal(["generate", "work", "--module", "x25519"], [""])
    assert code == os.EX_USAGE
    assert "upcall: nothing was typed: --no-passphrase makes a key without a passphrase" in seen


def test_remove_says_that_the_key_is_gone_and_whether_its_file_is(home: Path) -> None:
    run("generate", "work", "--module", "x25519", "--no-add", "--no-passphrase")
    path = home / "DATA/upcall/keys/work.pem"
    assert run("remove", "work", "--yes").stdout == f"the key work is removed, and {path} is deleted\n"


def test_list_and_show_tell_whether_a_key_is_open_or_locked(daemon: Running) -> None:
    run("generate", "--bits", "2048", word=WORD)
    signature = shown("default")["signature"]
    assert daemon.works(signature)
    assert (shown("default")["state"], shown("default")["locked"]) == ("open", None)
    run("lock")
    row = json.loads(run("list", "--json").stdout)[0]
    assert (row["state"], row["locked"]["cause"]) == ("locked", "command")
    assert re.search(r"state +locked since \S+ \(upcall lock\)\n", run("show", "default").stdout)
    assert re.search(r"default +\S+ +locked since \S+ \(upcall lock\) ", run("list").stdout)
    run("remove", "default", "--keyring-only")
    assert shown("default")["state"] == "not added"


def test_a_locked_key_without_a_passphrase_works_after_add(daemon: Running) -> None:
    run("generate", "open", "--bits", "2048", "--no-passphrase")
    run("lock", "open")
    assert not daemon.works(shown("open")["signature"])
    run("add", "open")
    assert daemon.works(shown("open")["signature"])


def test_lock_without_a_daemon_is_an_error() -> None:
    assert "no daemon" in run("lock", code=os.EX_UNAVAILABLE).stderr


# --- on a terminal, and with the keyring library ---------------------------------------------------------------


def on_a_terminal(arguments: list[str], answers: list[str]) -> tuple[int, str]:
    """Exit code, and what was to be seen."""
    command = [sys.executable, "-c", "from upcall.cli import main; main()", "key", *arguments]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, command)
    seen, deadline = b"", time.monotonic() + 60
    try:
        while select.select([terminal], [], [], deadline - time.monotonic())[0]:
            try:
                seen += os.read(terminal, 10000)
            except OSError:
                break
            if answers and seen.endswith(b": "):
                os.write(terminal, answers.pop(0).encode() + b"\n")
    finally:
        os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), seen.decode()


def test_passphrases_are_asked_on_the_terminal_without_echo(daemon: Running) -> None:
    code, seen = on_a_terminal(["generate", "--bits", "2048"], [WORD, WORD])
    assert code == 0, seen
    assert "New passphrase for the key default: \r\nThe same once more: \r\n" in seen
    assert WORD not in seen
    assert daemon.works(shown("default")["signature"])
    code, seen = on_a_terminal(["add"], [WORD])
    assert code == 0, seen
    assert "Passphrase for the key default: \r\n" in seen


def test_two_passphrases_that_differ_are_refused_and_no_key_is_made(home: Path) -> None:
    code, seen = on_a_terminal(["generate"], [WORD, "other"])
    assert code == os.EX_USAGE
    assert "the two passphrases differ" in seen
    assert not list((home / "DATA/upcall/keys").iterdir())


@pytest.fixture
def backend(home: Path) -> Path:
    (home / "CONFIG/python_keyring").mkdir()
    config = f"[backend]\ndefault-keyring=ours.Backend\nkeyring-path={home}\n"
    (home / "CONFIG/python_keyring/keyringrc.cfg").write_text(config)
    (home / "ours.py").write_text(BACKEND)
    return home


def in_a_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The keyring library chooses its backend once per process."""
    command = [sys.executable, "-c", "from upcall.cli import main; main()", "key", *arguments, "--passphrase-fd", "0"]
    return subprocess.run(command, input=WORD, capture_output=True, text=True, timeout=60)


def test_a_passphrase_kept_by_the_keyring_library_is_found_by_add(backend: Path) -> None:
    done = in_a_process("generate", "kept", "--bits", "2048", "--passphrase-keyring")
    assert done.returncode == 0, done.stderr
    told = shown("kept")
    assert told["source"] == "keyring"
    assert json.loads((backend / "kept.json").read_text()) == {f"upcall/{told['signature']}": WORD}
    running = Running()
    try:
        run("remove", "kept", "--keyring-only")
        run("add", "kept")
        assert running.works(told["signature"])
    finally:
        running.close()


def test_generate_fails_without_a_key_if_the_keyring_library_refuses(backend: Path) -> None:
    (backend / "locked").touch()
    done = in_a_process("generate", "kept", "--bits", "2048", "--passphrase-keyring")
    assert done.returncode == os.EX_UNAVAILABLE
    assert "cannot keep it: somebody said no" in done.stderr
    assert not list((backend / "DATA/upcall/keys").iterdir())


@pytest.mark.skipif(bool(unusable()), reason=unusable())
def test_a_note_says_that_the_kernel_keeps_the_passphrase_until_the_next_boot(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    container = f"upcall-test-{os.urandom(6).hex()}"
    monkeypatch.setenv("PYTHON_KEYRING_BACKEND", "upcall.keys.keyring_backend.KernelKeyring")
    monkeypatch.setenv("KEYRING_PROPERTY_CONTAINER", container)
    monkeypatch.setenv("KEYRING_PROPERTY_WHERE", "user")
    try:
        done = in_a_process("generate", "kept", "--bits", "2048", "--passphrase-keyring", "--no-add")
        assert done.returncode == 0, done.stderr
        assert "note: remember the passphrase!" in done.stderr and "until the next boot" in done.stderr
        signature = shown("kept")["signature"]
        assert f"`keyring set upcall {signature}` stores it again" in done.stderr
        assert WORD not in done.stderr + done.stdout
        assert fetch(signature, "keyring") == WORD.encode()
    finally:
        keyring.ensure_user_keyring_linked()
        held = keyring.search(keyring.USER_KEYRING, "keyring", container)
        if held is not None:
            keyring.unlink(held)


def test_unlock_tries_a_passphrase_that_is_given_and_needs_the_file_it_is_kept_in(daemon: Running, home: Path) -> None:
    right, wrong = home / "right", home / "wrong"
    for file, text in ((right, "right"), (wrong, "wrong")):
        file.touch(0o600)
        file.write_text(text)
    run("generate", "--bits", "2048", "--passphrase-file", right)
    run("unlock", "default", "--passphrase-file", wrong, code=os.EX_DATAERR)
    run("unlock", "default", "--passphrase-file", right)
    right.unlink()
    assert f"{right}: No such file" in run("unlock", "default", code=os.EX_NOINPUT).stderr
    assert f"{right}: No such file" in run("unlock", code=os.EX_NOINPUT).stderr


# --- exit codes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("x"), os.EX_USAGE),
        (PeerError("x", "y"), os.EX_DATAERR),
        (ModuleFailed("x"), os.EX_DATAERR),
        (Refused("locked"), os.EX_NOPERM),
        (NoPassphrase("x"), os.EX_UNAVAILABLE),
        (FileNotFoundError(), os.EX_NOINPUT),
        (FileExistsError(), os.EX_CANTCREAT),
        (PermissionError(), os.EX_NOPERM),
        (OSError(), os.EX_OSERR),
    ],
    ids=[
        "UsageError",
        "PeerError",
        "ModuleFailed",
        "Refused",
        "NoPassphrase",
        "FileNotFoundError",
        "FileExistsError",
        "PermissionError",
        "OSError",
    ],
)
def test_each_error_has_its_exit_code(error: Exception, code: int) -> None:
    assert exit_code(error) == code


def test_a_missing_or_unknown_command_or_argument_is_a_usage_error() -> None:
    for arguments in ([], ["nix"]):
        run(*arguments, code=os.EX_USAGE)
    run("show", code=os.EX_USAGE)

"""The kernel's own keyrings, a real daemon, and sessions that lead nowhere: the user manager's, one that is over.

A systemd user session has a session keyring that is not linked to the user keyring: there one cannot read what one has
put into one's own user keyring. And a logout revokes the login's session keyring for all that inherited it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.sessions_of_keys import SESSIONS, run_within, within
from upcall.core.errors import Refused
from upcall.daemon.plugins import Module, Plugins
from upcall.kernel import keyring
from upcall.process.control import DaemonControl
from upcall.process.settings import dumps
from upcall.testing.processes import ONLY_AGENT, RunningBroker, Started, until

KEY = b"0123456789abcdef"
StartReal = Callable[..., Started]


@pytest.fixture(autouse=True)
def home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folders of our own; what was added to the user keyring goes."""
    for name, variable in (("run", "XDG_RUNTIME_DIR"), ("data", "XDG_DATA_HOME"), ("config", "XDG_CONFIG_HOME")):
        (folder.parent / name).mkdir(mode=0o700)
        monkeypatch.setenv(variable, str(folder.parent / name))
    yield folder.parent
    keyring.ensure_user_keyring_linked()
    for key in keyring.list_user_keyring():
        if (
            key.type == "user"
            and len(key.description) == 16
            and os.fsencode(folder.parent) in keyring.read(key.serial)
        ):
            keyring.unlink(key.serial)


@pytest.fixture
def start(folder: Path, broker: RunningBroker) -> Iterator[StartReal]:
    started: list[Started] = []

    def begin(session: str = "linked", *options: str, registered: bool = True) -> Started:
        arguments = ["-m", "upcall", "daemon", "--runtime", str(folder), "--isolate", "openssl", "--ask", "agent"]
        daemon = Started(within(session, *arguments, *options), folder.parent / "daemon.log")
        started.append(daemon)
        if registered:
            broker.registered(daemon.pid)
        return daemon

    yield begin
    for one in started:
        one.__exit__()


def make(name: str = "default", *options: str, session: str = "linked") -> str:
    """`upcall key generate`; gives the signature."""
    command = ["-m", "upcall", "key", "generate", name, "--bits", "2048", *options]
    return run_within(session, command).split()[1]


def works(broker: RunningBroker, signature: str) -> bool:
    with broker.client() as client:
        try:
            return client.unwrap(signature, client.wrap(signature, KEY)) == KEY
        except Refused as refused:
            assert refused.reason == "no-key", refused.reason
            return False


@pytest.mark.parametrize("theirs", SESSIONS)
@pytest.mark.parametrize("ours", SESSIONS)
def test_a_key_added_in_another_session_is_used_until_removed(
    broker: RunningBroker, start: StartReal, ours: str, theirs: str
) -> None:
    start(ours)
    signature = make("default", "--no-passphrase", "--no-add", session=theirs)
    assert not works(broker, signature)
    run_within(theirs, ["-m", "upcall", "key", "add"])
    assert works(broker, signature)
    shown = json.loads(run_within(theirs, ["-m", "upcall", "key", "list", "--json"]))
    assert next(one for one in shown if one["signature"] == signature)["in_keyring"]
    for session in SESSIONS:  # a mount helper looks there, too, from wherever it is started
        found = run_within(session, ["-c", f"from upcall.kernel import keyring as k; print(k.find({signature!r}))"])
        assert int(found) == keyring.find(signature)
    run_within(theirs, ["-m", "upcall", "key", "remove", "default", "--keyring-only"])
    assert not works(broker, signature)


@pytest.mark.parametrize("ours", SESSIONS)
def test_a_key_that_only_its_possessors_may_read_works_in_the_daemon(
    broker: RunningBroker, start: StartReal, ours: str
) -> None:
    """ecryptfs-utils leaves the kernel's default permissions: only a possessor may read the key."""
    signature = make("default", "--no-passphrase")
    again = f"""if True:
        from upcall.kernel import keyring as k
        k.join_session_and_link_user_keyring()
        payload = k.read(k.find({signature!r}))
        k.unlink(k.find({signature!r}))
        print(k._add_key(k._ADD_KEY, b"user", {signature.encode()!r}, payload, len(payload), k.USER_KEYRING))
    """
    serial = int(run_within("linked", ["-c", again]))
    assert keyring.describe(serial).permissions == 0x3F010000
    read = f"""if True:
        from upcall.kernel import keyring as k
        try:
            k.read(k.find({signature!r}))
        except PermissionError:
            print("no")
    """
    assert run_within("bare", ["-c", read]) == "no\n"  # which is the trap
    start(ours)
    assert works(broker, signature)


def test_a_daemon_works_after_its_login_sessions_keyring_was_revoked(
    broker: RunningBroker, folder: Path, home: Path
) -> None:
    """The daemon was started from that session; isolated processes started later work, too."""
    signature = make("default", "--no-passphrase")
    login = """if True:
        import subprocess, sys
        from upcall.kernel import keyring
        session = keyring.join_session_and_link_user_keyring()
        daemon = subprocess.Popen([sys.executable, *sys.argv[1:]])
        print(daemon.pid, flush=True)
        sys.stdin.readline()
        keyring.revoke(session)
        print("revoked", flush=True)
        sys.stdin.readline()
        daemon.kill()
        daemon.wait()
    """
    plugins = Plugins((Module("openssl", "upcall_rsa:module", isolated=True),))
    settings = ONLY_AGENT._replace(folder=folder, plugins=plugins)
    arguments = ["-m", "upcall.daemon", dumps(settings)]
    session = subprocess.Popen([sys.executable, "-c", login, *arguments], stdin=-1, stdout=-1, text=True)
    assert session.stdin is not None and session.stdout is not None
    try:
        broker.registered(int(session.stdout.readline()))
        assert works(broker, signature)
        session.stdin.write("\n")
        session.stdin.flush()
        assert session.stdout.readline() == "revoked\n"
        assert works(broker, signature)
        with DaemonControl() as control:
            before = child_of(control)
            os.kill(before, signal.SIGKILL)
            until(lambda: child_of(control) != before, "its end was seen")
            control.unlock(signature, bytearray())
            assert works(broker, signature)
            assert child_of(control) not in (None, before)
        other = make("other", "--no-passphrase")
        assert works(broker, other)
    finally:
        session.communicate("\n", timeout=60)


def child_of(control: DaemonControl) -> Any:
    """The pid of the process that has the key module."""
    return next(one["pid"] for one in control.status()["keys"] if one.get("isolated"))


# --- keys at login ---------------------------------------------------------------------------------------------


def file_of(name: str) -> Path:
    return Path(os.environ["XDG_DATA_HOME"]) / "upcall/keys" / f"{name}.toml"


@pytest.mark.parametrize("session", SESSIONS)
def test_keys_marked_auto_are_added_when_the_daemon_starts(
    broker: RunningBroker, start: StartReal, home: Path, session: str
) -> None:
    word = home / "word"
    word.write_text("correct horse\n")
    word.chmod(0o600)
    mine = make("mine", "--no-passphrase", "--no-add", "--auto")
    filed = make("filed", "--passphrase-file", str(word), "--no-add")
    run_within("linked", ["-m", "upcall", "key", "auto", "filed"])
    left = make("left", "--no-passphrase", "--no-add")
    once = make("once", "--no-passphrase", "--no-add", "--auto")
    run_within("linked", ["-m", "upcall", "key", "auto", "once", "--off"])
    daemon = start(session)
    assert works(broker, mine) and works(broker, filed)
    assert not works(broker, left) and not works(broker, once)
    daemon.logged(f"key-added name=mine signature={mine}")
    assert {one["name"]: one["auto"] for one in listed()} == {
        "mine": True, "filed": True, "left": False, "once": False,
    }  # fmt: skip
    again = start(session)  # what is there stays there
    assert works(broker, mine)
    again.signal(signal.SIGTERM)
    assert again.wait() == 0
    assert again.log.count("key-added") == 2


def listed() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(run_within("linked", ["-m", "upcall", "key", "list", "--json"]))
    return [one for one in found if one["name"] is not None]


def test_an_auto_keys_typed_passphrase_is_asked_for_at_first_use(
    broker: RunningBroker, start: StartReal, home: Path
) -> None:
    from tests.test_prompting_daemon import terminal

    reader, writer = os.pipe()
    os.write(writer, b"correct horse\n")
    os.close(writer)
    command = ["-m", "upcall", "key", "generate", "typed", "--bits", "2048", "--auto", "--no-add"]
    done = subprocess.run(
        [sys.executable, *command, "--passphrase-fd", str(reader)], pass_fds=[reader], capture_output=True, text=True
    )
    os.close(reader)
    signature = done.stdout.split()[1]
    daemon = start("bare")
    daemon.logged("key-added")
    assert "prompt" not in daemon.log and "prompt-unavailable" not in daemon.log
    with terminal() as typist, broker.client(5.5) as client:
        with pytest.raises(Refused, match="prompting"):
            client.wrap(signature, KEY)
        typist.expect("Key: typed")
        typist.expect("Passphrase: ")
        typist.type("correct horse\n")
        daemon.logged("outcome=answered")
        assert client.unwrap(signature, client.wrap(signature, KEY)) == KEY
    assert "correct horse" not in daemon.log


def test_damaged_auto_keys_are_reported_and_a_good_one_is_added(
    broker: RunningBroker, start: StartReal, home: Path
) -> None:
    good = make("z-good", "--no-passphrase", "--no-add", "--auto")
    text = file_of("z-good").read_text()
    bad = {
        "damaged": "signature = [",
        "binary": "\0\xff",
        "open": text,
        "alias": text.replace('module = "openssl"', 'module = "\u00fc"').replace(good, "0" * 16),
        "compat": text.replace('source = "none"', 'source = "compat"').replace(good, "1" * 16).partition("blob")[0]
        + "auto = true\n[parameters]\n",
        "deep": "x = " + "[" * 8000,
        "nobodys": text.replace(good, "2" * 16),
    }
    for name, content in bad.items():
        file_of(name).write_text(content)
        file_of(name).chmod(0o644 if name == "open" else 0o600)
    if os.geteuid() == 0:
        os.chown(file_of("nobodys"), 65534, 65534)
    file_of("folder").mkdir()
    file_of("nowhere").symlink_to("/nowhere/at/all")
    daemon = start()
    assert works(broker, good)
    reasons = {
        "damaged": "Invalid value", "open": "mode 0644 lets others in", "alias": "", "compat": "compat key holds",
        "deep": "", "folder": "is a directory", "nowhere": "is a symbolic link",
    }  # fmt: skip
    if os.geteuid() == 0:
        reasons["nobodys"] = "belongs to uid 65534"
    for name, why in reasons.items():
        line = next(line for line in daemon.log.splitlines() if f"file={file_of(name)} " in line)
        assert "key-add-failed" in line and why in line, line
    with DaemonControl() as control:
        told = {Path(one["file"]).stem for one in control.status()["not_added"]}
    assert told >= reasons.keys()


def test_an_unreadable_key_folder_is_logged_at_start(broker: RunningBroker, start: StartReal, home: Path) -> None:
    (home / "data/upcall").mkdir()
    (home / "data/upcall/keys").write_text("no folder")
    start().logged("key-add-failed")


def test_a_compat_key_cannot_be_marked_auto(home: Path) -> None:
    make("mine", "--no-passphrase", "--no-add")
    path = file_of("mine")
    text = path.read_text().replace('source = "none"', 'source = "compat"')
    path.write_text("\n".join(line for line in text.splitlines() if not line.startswith("blob")))
    for command in (["auto", "mine"], ["add", "mine", "--auto"], ["import", "x", "--compat", "--auto"]):
        done = subprocess.run([sys.executable, "-m", "upcall", "key", *command], capture_output=True, text=True)
        assert done.returncode == os.EX_USAGE
        assert "cannot be added without asking" in done.stderr

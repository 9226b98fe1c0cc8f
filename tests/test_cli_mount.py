"""`upcall mount`, `umount` and `mounts`: what is remembered, and what is said; the source that mounts is played."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.test_cli_key import WORD, Running, daemon, home
from tests.typing_there import Typist
from upcall import config
from upcall.cli import main
from upcall.cli import mount as commands
from upcall.core.errors import PeerError, UsageError
from upcall.keys.mounts import MountEntry, MountStore
from upcall.keys.store import KeyStore
from upcall.protocols.ecryptfs.mounting import allowed
from upcall.protocols.ecryptfs.mounting.allowed import MountRules
from upcall.protocols.ecryptfs.mounting.client import MountRefused
from upcall.protocols.ecryptfs.mounting.messages import MountRequest
from upcall.testing.processes import until

__all__ = ["daemon", "home"]  # the fixtures

SIGNATURE = "0123456789abcdef"
WITHOUT_SOURCE = """
from upcall.cli import main, mount
mount.ask_mount, mount.mounted = lambda request, lower, upper, folder: str(upper), lambda uid: {}
main()
"""  # a program: `upcall`, whose source always mounts


class Source:
    """Plays the source: what was asked of it, and what is mounted."""

    def __init__(self) -> None:
        self.asked: list[MountRequest] = []
        self.mounted: dict[str, str] = {}
        self.refusal: MountRefused | None = None

    def mount(self, request: MountRequest, lower: Path, upper: Path, folder: Path) -> str:
        if self.refusal is not None:
            raise self.refusal
        self.asked.append(request)
        self.mounted[request.name] = str(upper)
        return str(upper)

    def unmount(self, name: str, upper: Path, lazy: bool, folder: Path) -> str:
        if self.refusal is not None and not lazy:
            raise self.refusal
        assert self.mounted.pop(name) == str(upper)
        return str(upper)


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Source:
    played = Source()
    monkeypatch.setattr(commands, "ask_mount", played.mount)
    monkeypatch.setattr(commands, "ask_unmount", played.unmount)
    monkeypatch.setattr(commands, "mounted", lambda uid: dict(played.mounted))
    monkeypatch.setattr(commands, "_add_keys", lambda ctx, entry: None)
    return played


@pytest.fixture
def folders(home: Path, key: str) -> Iterator[tuple[str, str]]:
    yield str(home / "lower"), str(home / "upper")


@pytest.fixture
def key(home: Path) -> str:
    """The signature of a key called default."""
    run("key", "generate", "--no-passphrase", "--bits", "2048", "--no-add")
    return KeyStore().load("default").signature


def run(*words: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, words)
    assert result.exit_code == code, result.output
    return result


def test_a_mount_is_remembered_by_its_name(source: Source, folders: tuple[str, str], key: str) -> None:
    result = run("mount", "private", *folders, "--create")
    assert result.stdout == f"private: mounted on {folders[1]}\n"
    assert [oct(Path(folder).stat().st_mode)[-3:] for folder in folders] == ["700", "700"]
    assert source.asked == [MountRequest(1, "private", (key,))]
    assert run("umount", "private").stdout == f"private: unmounted from {folders[1]}\n"
    assert run("umount", "private").stdout == "private: is not mounted\n"
    assert run("mount", "private").stdout == f"private: mounted on {folders[1]}\n"
    assert source.asked[1:] == source.asked[:1]
    assert run("mount", "private").stdout == f"private: is mounted on {folders[1]}\n"


def test_options_are_remembered_and_changed_while_it_is_mounted(source: Source, folders: tuple[str, str]) -> None:
    run("mount", "private", *folders, "--create", "--auto", "--on-logout", "--key-bytes", "32")
    entry = MountStore().load("private")
    assert (entry.auto, entry.unmount_on, entry.key_bytes) == (True, ("logout",), 32)
    run("mount", "private", "--no-auto", "--on-lock")
    entry = MountStore().load("private")
    assert (entry.auto, entry.unmount_on, entry.key_bytes) == (False, ("lock", "logout"), 32)


def _with_a_passphrase(home: Path) -> tuple[str, list[str]]:
    """Makes a key whose passphrase is asked for. Returns its signature and the words of a mount with it."""
    command = CliRunner().invoke(main, ["key", "generate", "--bits", "2048", "--passphrase-fd", str(_pipe(WORD))])
    assert command.exit_code == 0, command.output
    return KeyStore().load("default").signature, ["mount", "private", str(home / "lower"), str(home / "upper")]


def _pipe(word: str) -> int:
    reader, writer = os.pipe()
    os.write(writer, f"{word}\n".encode())
    os.close(writer)
    return reader


@pytest.mark.parametrize("locked", [True, False])
def test_a_passphrase_that_the_daemon_lacks_is_asked_for_before_mounting(
    daemon: Running, home: Path, locked: bool
) -> None:
    """As after a login: the token can still be in the user keyring, while the daemon has forgotten the passphrase."""
    signature, words = _with_a_passphrase(home)
    if locked:
        run("lock")
    else:
        daemon.keys.cache.lock(None, "screen-lock")
        daemon.keys.cache.unlock_all("screen-lock")
    assert not daemon.works(signature)
    with Typist(["-c", WITHOUT_SOURCE, *words, "--create"]) as there:
        there.expect("Passphrase for the key default: ")
        there.type(f"{WORD}\n")
        there.expect("private: mounted on ")
        assert there.ended() == 0
    assert daemon.works(signature)


def test_a_wrong_passphrase_mounts_nothing(daemon: Running, home: Path) -> None:
    _, words = _with_a_passphrase(home)
    run("lock")
    with Typist(["-c", WITHOUT_SOURCE, *words, "--create"]) as there:
        there.expect("Passphrase for the key default: ")
        there.type("wrong\n")
        assert there.ended() == os.EX_DATAERR
    assert "mounted" not in there.seen
    assert not (home / "lower").exists() and not (home / "upper").exists()


def test_a_key_that_is_open_is_mounted_without_a_question(daemon: Running, home: Path) -> None:
    signature, words = _with_a_passphrase(home)
    assert daemon.works(signature)
    with Typist(["-c", WITHOUT_SOURCE, *words, "--create"]) as there:
        assert there.ended() == 0
    assert "assphrase" not in there.seen


@pytest.mark.parametrize(("cause", "why"), [("command", "is locked since"), ("", "waits for its passphrase")])
def test_without_a_terminal_the_command_that_unlocks_is_named(
    daemon: Running, home: Path, cause: str, why: str
) -> None:
    _, words = _with_a_passphrase(home)
    daemon.keys.cache.lock(None, cause or "screen-lock")
    if not cause:
        daemon.keys.cache.unlock_all("screen-lock")
    command = [sys.executable, "-c", WITHOUT_SOURCE, *words, "--create"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert f"the key default {why}" in done.stderr
    assert "no file can be opened until `upcall unlock default`" in done.stderr


def test_a_missing_folder_is_not_made_unasked(source: Source, folders: tuple[str, str]) -> None:
    result = run("mount", "private", *folders, code=os.EX_NOINPUT)
    assert result.stderr == f"upcall: {folders[0]}: is not there: --create makes it\n"
    assert not Path(folders[0]).exists() and MountStore().names() == []


def test_a_folder_that_cannot_be_remembered_is_not_mounted(source: Source, folders: tuple[str, str]) -> None:
    result = run("mount", "private", folders[0], f"{folders[1]}\udcff", "--create", code=os.EX_USAGE)
    assert "not UTF-8" in result.stderr
    assert not source.asked


def test_processes_that_use_a_mount_are_named(tmp_path: Path) -> None:
    inside = tmp_path / "mount" / "inside"
    inside.mkdir(parents=True)
    beside = tmp_path / "mount-2"
    beside.mkdir()
    with (
        subprocess.Popen(["sleep", "1000"], cwd=inside) as working,
        subprocess.Popen(["sleep", "1000"], cwd=beside) as elsewhere,
        (inside / "file").open("w") as file,
        subprocess.Popen(["sleep", "1000"], stdin=file) as reading,
    ):
        try:
            until(lambda: len(commands._users_of(str(tmp_path / "mount"))) == 2, "both were executed")
            lines = commands._users_of(str(tmp_path / "mount"))
        finally:
            for process in (working, elsewhere, reading):
                process.kill()
    assert lines == [
        f"in use by sleep (pid {working.pid}): works there",
        f"in use by sleep (pid {reading.pid}): has {inside}/file open",
    ]


def test_another_place_under_the_same_name_is_refused(source: Source, folders: tuple[str, str]) -> None:
    run("mount", "private", *folders, "--create")
    result = run("mount", "private", folders[1], folders[0], code=os.EX_USAGE)
    assert "`upcall mounts forget private`" in result.stderr
    assert "umount private` first" in run("mounts", "forget", "private", code=os.EX_USAGE).stderr
    run("umount", "private")
    run("mounts", "forget", "private")
    assert "no mount 'private' is known" in run("mount", "private", code=os.EX_USAGE).stderr


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("mount",), "which mount?"),
        (("mount", "private", "/lower"), "LOWER and UPPER are both given"),
        (("mount", "../x", "/a", "/b"), "cannot be the name of a mount"),
        (("mount", "x.toml", "/a", "/b"), "cannot be the name of a mount"),
        (("mount", "private", "/a", "/b", "--names-key", "x"), "16 hexadecimal digits"),
        (("mount", "private", "/a", "/b", "--key", "none"), "no key 'none'"),
        (("umount",), "which mount?"),
        (("umount", "private"), "no mount 'private' is known"),
        (("mounts", "forget", "private"), "no mount 'private' is known"),
    ],
)
def test_what_cannot_be_meant_is_refused(source: Source, key: str, words: tuple[str, ...], text: str) -> None:
    assert text in run(*words, code=os.EX_USAGE).stderr


def test_without_a_key_the_command_that_makes_one_is_named(source: Source, home: Path) -> None:
    assert "`upcall key generate`" in run("mount", "private", "/a", "/b", code=os.EX_USAGE).stderr


def test_without_a_service_the_error_says_in_one_sentence_what_the_administrator_can_do(
    folders: tuple[str, str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "SYSTEM", Path("/etc/upcall/config.toml"))
    monkeypatch.setattr(allowed, "rules", MountRules)
    user = pwd.getpwuid(os.getuid()).pw_name
    result = run("mount", "private", *folders, "--create", "--runtime", str(home / "run"), code=os.EX_UNAVAILABLE)
    assert result.stderr == (
        f'upcall: mounting is off: the administrator can allow it: `[mount] users = ["{user}"]` in '
        "/etc/upcall/config.toml, then `systemctl restart upcall-mount`\n"
    )
    assert len(result.stderr) < 170
    assert MountStore().names() == []
    assert not any(map(os.path.lexists, folders)), "what is written to them would be in clear"


def test_a_service_that_does_not_run_although_users_may_mount_is_started_by_the_command_in_the_error(
    folders: tuple[str, str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allowed, "rules", lambda: MountRules(("@staff",)))
    nowhere = ("--runtime", str(home / "none"))
    text = f"upcall: no service mounts for users here ({home}/none/mount.sock: No such file or directory): "
    text += "start it as root: `systemctl restart upcall-mount`\n"
    assert run("mount", "private", *folders, "--create", *nowhere, code=os.EX_UNAVAILABLE).stderr == text
    Path(folders[1]).mkdir()
    monkeypatch.setattr(commands, "mounted", lambda uid: {"private": folders[1]})
    assert run("umount", "private", *nowhere, code=os.EX_UNAVAILABLE).stderr == text


def test_a_refusal_of_the_source_is_passed_on(source: Source, folders: tuple[str, str]) -> None:
    source.refusal = MountRefused(os.EX_NOPERM, "mounting is off\x1b[31m")
    result = run("mount", "private", *folders, "--create", code=os.EX_NOPERM)
    assert result.stderr == "upcall: mounting is off\\x1b[31m\n"
    assert MountStore().names() == []
    assert not any(map(os.path.lexists, folders))


def test_a_mount_in_use_stays_at_a_lock_and_goes_at_a_logout(source: Source, folders: tuple[str, str]) -> None:
    run("mount", "private", *folders, "--create", "--on-lock", "--on-logout")
    source.refusal = MountRefused(os.EX_TEMPFAIL, "is in use")
    assert "is in use" in run("umount", "--on", "lock", code=os.EX_TEMPFAIL).stderr
    assert source.mounted
    run("umount", "--on", "logout")
    assert not source.mounted


def test_only_mounts_that_are_marked_follow_an_event(source: Source, folders: tuple[str, str]) -> None:
    run("mount", "private", *folders, "--create", "--on-lock")
    run("umount", "--on", "logout")
    assert source.mounted
    run("umount", "--on", "lock")
    assert not source.mounted


def test_a_login_mounts_what_is_marked_and_asks_nothing(
    source: Source, folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    added = []
    monkeypatch.setattr("upcall.protocols.ecryptfs.auto_add.add_token", lambda entry: added.append(entry.name))
    run("mount", "private", *folders, "--create", "--auto")
    run("mount", "other", *(f"{folder}-2" for folder in folders), "--create")
    run("umount", "--all")
    run("mount", "--login")
    assert list(source.mounted) == ["private"] and added == ["default"]
    run("mount", "--login")
    assert len(source.asked) == 3


def test_mounts_are_listed_for_people_and_programs(source: Source, folders: tuple[str, str], key: str) -> None:
    assert "no mounts" in run("mounts").stdout
    run("mount", "private", *folders, "--create", "--auto", "--on-lock")
    source.mounted["foreign"] = "/somewhere"
    private, foreign = json.loads(run("mounts", "--json").stdout)
    assert private == {
        "name": "private",
        "lower": folders[0],
        "upper": folders[1],
        "signatures": [key],
        "key_bytes": 16,
        "names_signature": "",
        "auto": True,
        "unmount_on": ["lock"],
        "mounted": folders[1],
        "keys": ["default"],
    }
    assert (foreign["name"], foreign["mounted"], foreign["lower"]) == ("foreign", "/somewhere", None)
    lines = run("mounts").stdout.splitlines()
    assert lines[0].split()[:3] == ["NAME", "MOUNTED", "UPPER"]
    assert lines[1].split() == ["private", "yes", folders[1], folders[0], "default", "yes", "lock"]


def test_a_renamed_key_keeps_its_mounts(source: Source, folders: tuple[str, str], key: str) -> None:
    run("mount", "private", *folders, "--create")
    store = KeyStore()
    entry = store.load("default")
    store.save(entry._replace(name="renamed"))
    (store.directory / "default.toml").unlink()
    (row,) = json.loads(run("mounts", "--json").stdout)
    assert row["keys"] == ["renamed"]


# --- the store -----------------------------------------------------------------------------------------------------

ENTRY = MountEntry("private", "/lower", "/upper", (SIGNATURE,))


def test_an_entry_is_read_back(tmp_path: Path) -> None:
    store = MountStore(tmp_path / "mounts")
    full = MountEntry("full", "/a b", "/ü", (SIGNATURE, "f" * 16), 32, SIGNATURE, True, ("lock", "logout"))
    for entry in (ENTRY, full):
        store.save(entry)
        store.save(entry)
        assert store.load(entry.name) == entry
    assert store.names() == ["full", "private"] and store.all() == [full, ENTRY]
    assert oct((store.directory / "full.toml").stat().st_mode)[-3:] == "600"
    assert store.find("none") is None


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "lower = '/a'\nupper = '/b'",
        "lower = 'a'\nupper = '/b'\nsignatures = ['0123456789abcdef']",
        "lower = '/a'\nupper = '/b'\nsignatures = []",
        "lower = '/a'\nupper = '/b'\nsignatures = ['x']",
        "lower = '/a'\nupper = '/b'\nsignatures = '0123456789abcdef'",
        "lower = '/a'\nupper = '/b'\nsignatures = ['0123456789abcdef']\nkey_bytes = 17",
        "lower = '/a'\nupper = '/b'\nsignatures = ['0123456789abcdef']\nkey_bytes = true",
        "lower = '/a'\nupper = '/b'\nsignatures = ['0123456789abcdef']\nunmount_on = ['never']",
        "lower = '/a'\nupper = '/b'\nsignatures = ['0123456789abcdef']\noptions = 'suid'",
        "lower = '/a'\nupper = '/b'\nsignatures = ['0123456789abcdef']\nnames_signature = 'x,suid'",
    ],
)
def test_a_damaged_entry_is_an_error_with_its_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "private.toml"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(PeerError, match=r"private\.toml"):
        MountStore(tmp_path).load("private")


def test_a_damaged_entry_does_not_hide_the_others(source: Source, folders: tuple[str, str]) -> None:
    run("mount", "private", *folders, "--create")
    broken = MountStore().directory / "broken.toml"
    broken.write_text("x")
    broken.chmod(0o600)
    result = run("mounts", code=os.EX_DATAERR)
    assert "broken.toml" in result.stderr and "private" in result.stdout


def test_a_name_that_is_no_file_name_is_refused(tmp_path: Path) -> None:
    for name in ("", ".", "a/b", "../x", "a b", "x" * 65, "x.toml"):
        with pytest.raises(UsageError):
            MountStore(tmp_path).load(name)

"""Privilege dropping in daemons: processes that try what is forbidden, and the state that the kernel reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import escaping
from upcall.daemon.plugins import Module, Plugins
from upcall.daemon.settings import DaemonSettings
from upcall.kernel import keyring, landlock, process, seccomp
from upcall.process import hardening
from upcall.process.control import DaemonControl
from upcall.process.hardening import DaemonHardening
from upcall.process.settings import dumps
from upcall.protocols.ecryptfs.authtok import AuthTok, pack_auth_tok
from upcall.testing.keys import FolderKeyring
from upcall.testing.processes import RunningBroker, RunningDaemon, Started, in_child, until

HERE = Path(__file__).parent
KEY = b"0123456789abcdef"
ABI = landlock.abi()
MODULE = {"escaping": "tests.escaping:MODULE"}
ROOT = os.geteuid() == 0

pytestmark = pytest.mark.skipif(bool(seccomp.why_not()), reason=f"seccomp: {seccomp.why_not()}")
confined = pytest.mark.skipif(not ABI, reason=f"Landlock: {landlock.why_not()}")
_DEFAULTS = DaemonSettings()


class Scene:
    """A broker, and an escaping key of a daemon that is started as told."""

    def __init__(self, folder: Path, broker: RunningBroker, home: Path, pid: int, port: int) -> None:
        self._folder, self._broker, self.home = folder, broker, home
        self._report = folder.parent / "report"
        told = {"home": str(home), "pid": pid, "port": port, "report": str(self._report)}
        self._blob = json.dumps(told).encode()
        self.signature = os.urandom(8).hex()

    def report(
        self, isolated: bool, settings: DaemonSettings = _DEFAULTS, recorded: Path | None = None
    ) -> dict[str, Any]:
        """What a key module of a daemon has come to do. `recorded`: where a record of that is to come, besides."""
        FolderKeyring(self._folder.parent / "keys").add(self.signature, "escaping", self._blob)
        modules = {"modules": {}, "isolated": MODULE} if isolated else {"modules": MODULE}
        with RunningDaemon(
            self._folder, self._folder.parent / "keys", path=[HERE.parent], control=True, settings=settings,
            environment=self._home(), **modules,  # type: ignore[arg-type]
        ) as daemon:  # fmt: skip
            found = self._asked(daemon)
            if recorded is not None:
                until(lambda: "service=key" in recorded.read_text(), "a record")
            return found

    def report_of_the_users_own(self) -> dict[str, Any]:
        """The same of `upcall daemon` itself, with the user's own keyring."""
        serial = keyring.add_user_key(self.signature, pack_auth_tok(AuthTok(self.signature, "escaping", self._blob)))
        run = self._folder.parent / "run"
        run.mkdir(mode=0o700)
        settings = DaemonSettings(self._folder, plugins=Plugins((Module("escaping", MODULE["escaping"]),)))
        surroundings = {**self._home(), "XDG_RUNTIME_DIR": str(run), "PYTHONPATH": str(HERE.parent)}
        arguments = ["-m", "upcall.daemon", dumps(settings)]
        try:
            with Started(arguments, self._folder.parent / "daemon.log", surroundings) as daemon:
                return self._asked(daemon)
        finally:
            keyring.unlink(serial)

    def _home(self) -> dict[str, str]:
        return {"HOME": str(self.home)}

    def _asked(self, daemon: Started) -> dict[str, Any]:
        self._broker.registered(daemon.pid)
        with self._broker.client(60) as client:
            assert client.unwrap(self.signature, client.wrap(self.signature, KEY)) == KEY
        found: dict[str, Any] = json.loads(self._report.read_text())
        return found


@pytest.fixture
def scene(folder: Path, broker: RunningBroker, closed_home: Path, neighbour: int, open_port: int) -> Scene:
    return Scene(folder, broker, closed_home, neighbour, open_port)


def _check(report: dict[str, Any], home: Path) -> None:
    refused = report["forbidden"]
    if not ABI:  # then a plugin may write wherever its user may
        refused = {name: said for name, said in refused.items() if name not in [*escaping.forbidden(home, 0)][:8]}
    assert not {name: said for name, said in refused.items() if said not in ("EPERM", "EACCES")}
    assert set(report["families"].values()) == {"EAFNOSUPPORT"}
    assert report["holes"] == {name: refusal for name, (_, refusal) in escaping.HOLES.items()}
    assert set(report["works"].values()) == {"done"}, report["works"]
    for name, (version, _) in escaping.since(home, 0).items():
        assert (report["since"][name] in ("EPERM", "EACCES")) == (version <= ABI), name
    nothing = "0" * 16
    caps = {"CapEff": nothing, "CapPrm": nothing, "CapAmb": nothing}
    assert report["status"] == {"NoNewPrivs": "1", "Seccomp": "2", **caps}
    assert (report["core"], report["dumpable"]) == ([0, 0], 0)
    if ABI >= 3:
        assert (home / escaping.KEYS).read_text() == "before"
    if ABI:
        assert sorted(one.name for one in home.iterdir()) == [".bashrc", ".ssh"]


# --- daemons --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isolated", [False, True], ids=["inline", "isolated"])
def test_a_key_module_cannot_do_what_hardening_forbids(scene: Scene, isolated: bool) -> None:
    _check(scene.report(isolated), scene.home)


def test_a_key_module_in_a_users_daemon_cannot_do_what_hardening_forbids(scene: Scene) -> None:
    _check(scene.report_of_the_users_own(), scene.home)


def test_without_hardening_a_key_module_can_do_the_forbidden_things(scene: Scene) -> None:
    """What is refused above is not refused by something else."""
    report = scene.report(False, DaemonSettings(hardening=DaemonHardening(wanted=False)))
    files = [*escaping.forbidden(scene.home, 0)][:7]
    assert {report["forbidden"][name] for name in files} - {"ENOENT"} == {"done"}  # .bashrc has gone by then
    assert set(report["since"].values()) == {"done"}
    others = ("take another's descriptor", "another's namespace", "mount", "unmount")
    assert {report["forbidden"][name] for name in others} == {"EBADF", "ENOENT"}
    assert report["forbidden"]["another personality"] == "done"
    assert report["forbidden"]["type into a terminal"] == "ENOTTY"
    assert report["status"]["NoNewPrivs"] == "1"
    assert report["core"] == [0, 0]


@confined
def test_writable_in_the_configuration_opens_that_folder_only(scene: Scene) -> None:
    report = scene.report(False, DaemonSettings(hardening=DaemonHardening(writable=(scene.home / ".ssh",))))
    assert report["forbidden"]["append to authorized_keys"] == "done"
    assert report["forbidden"]["make .profile"] == "EACCES"


@confined
def test_the_record_file_stays_writable_and_its_own_folder_allows_rotation(
    scene: Scene, folder: Path, closed_home: Path
) -> None:
    """Directly in the home folder only the file itself is writable; a folder of its own allows a new file."""
    right, own = closed_home / "requests", closed_home / "log" / "requests"
    own.parent.mkdir()
    for where in (right, own):
        report = scene.report(False, DaemonSettings(records=str(where)), recorded=where)
        assert report["forbidden"]["make .profile"] == "EACCES"

    def tried(where: Path) -> list[str]:
        process.harden()
        hardening.of_daemon(DaemonHardening(), str(where), None)
        return [escaping.outcome(lambda: where.rename(where.with_suffix(".1"))), escaping.outcome(where.touch)]

    os.environ["HOME"], before = str(closed_home), os.environ["HOME"]
    try:
        assert in_child(lambda: tried(own)) == ["done", "done"]
        assert in_child(lambda: tried(right))[0] == "EACCES"
    finally:
        os.environ["HOME"] = before


def test_the_daemon_reports_its_hardening_in_status_and_log(
    folder: Path, broker: RunningBroker, keyring: FolderKeyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder.parent / "run"))
    with RunningDaemon(folder, folder.parent / "keys", {}, control=True) as daemon:
        broker.registered(daemon.pid)
        with DaemonControl() as control:
            said = control.status()["hardening"]
        assert said["seccomp"] == "yes"
        assert said["capabilities"] == "none"
        assert said["landlock"] == (str(ABI) if ABI else f"no: {landlock.why_not()}")
        daemon.logged(f"privileges-dropped seccomp=yes landlock={ABI}" if ABI else "privileges-dropped seccomp=yes")
        status = status_of(daemon.pid)
        assert (status["NoNewPrivs"], status["Seccomp"], int(status["CapEff"], 16)) == ("1", "2", 0)


def status_of(pid: int) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)


# --- from outside ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hardened", "seen"), [(False, {"done"}), (True, {"EPERM", "EACCES"})])
def test_a_process_of_the_same_user_cannot_read_or_trace_a_hardened_one(hardened: bool, seen: set[str]) -> None:
    """A parent may trace its child, whatever Yama says, unless the child is not dumpable."""

    def tried() -> list[str]:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                escaping._libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, as after exec: changing uids has cleared it
                if hardened:
                    process.harden()
                os.write(writer, b"x")
                time.sleep(60)
            finally:
                os._exit(0)
        os.read(reader, 1)
        try:
            found = [escaping.outcome(lambda: os.close(os.open(f"/proc/{pid}/mem", os.O_RDONLY)))]
            return [*found, escaping.outcome(lambda: escaping._by_name("ptrace", 0x4206, pid, 0, 0))]
        finally:
            os.kill(pid, 9)

    assert set(in_child(tried, uid=64999 if ROOT else None)) <= seen


# --- where it is told -----------------------------------------------------------------------------------------


def test_the_configuration_becomes_hardening_arguments_of_the_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from upcall import config
    from upcall.cli.daemon import _hardening

    system, user = tmp_path / "system.toml", tmp_path / "user" / "upcall" / "config.toml"
    user.parent.mkdir(parents=True)
    monkeypatch.setattr(config, "SYSTEM", system)
    monkeypatch.setattr(config, "VENDOR", tmp_path / "none.toml")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "user"))
    monkeypatch.setenv("HOME", "/home/ada")
    assert _hardening() == DaemonHardening()
    user.write_text('[hardening]\nwritable = ["/srv/x", "~/.softhsm"]\n')
    assert _hardening() == DaemonHardening(writable=(Path("/home/ada/.softhsm"), Path("/srv/x")))
    system.write_text('[hardening]\nwritable = ["/srv/x"]\n')
    assert _hardening() == DaemonHardening(writable=(Path("/srv/x"),))
    system.write_text("[hardening]\nwritable = []\n")
    assert _hardening() == DaemonHardening()
    system.write_text("[hardening]\ndaemon = false\n")
    assert _hardening() == DaemonHardening(wanted=False)
    user.write_text("[hardening]\ndaemon = false\n")
    with pytest.raises(config.ConfigError, match="only the system's"):
        _hardening()


def test_status_prints_the_brokers_hardening(folder: Path, broker: RunningBroker) -> None:
    command = [sys.executable, "-m", "upcall", "status", "--runtime", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "restrictions: seccomp yes, landlock" in done.stdout


@pytest.mark.parametrize(
    ("said", "states"),
    [
        ({"seccomp": "yes", "landlock": "7", "capabilities": "none"}, ["ok"]),
        ({"seccomp": "yes", "landlock": "no: this kernel has none", "capabilities": "none"}, ["note"]),
        ({"seccomp": f"no: {hardening.OFF}", "landlock": f"no: {hardening.OFF}", "capabilities": "none"}, ["problem"]),
    ],
)
def test_doctor_rates_missing_hardening_as_note_or_problem(said: dict[str, str], states: list[str]) -> None:
    from upcall.observe.doctor.hardening import judged

    assert [finding.state for finding in judged("the broker", said)] == states


@pytest.mark.parametrize(
    ("name", "opened"),
    [
        ("", []),
        ("KCM:", []),
        ("KEYRING:persistent:1000", []),
        ("FILE:relative", []),
        ("/tmp/krb5cc_1000", ["/tmp"]),
        ("FILE:/tmp/krb5cc_1000", ["/tmp"]),
        ("DIR:/run/user/1000/krb5cc", ["/run/user/1000/krb5cc"]),
        ("FILE:/home/ada/krb5cc", ["/home/ada/krb5cc"]),  # and not all of the home
        ("FILE:/krb5cc", ["/krb5cc"]),
        ("DIR:/home/ada", []),
    ],
)
def test_the_folder_of_the_ticket_cache_is_opened_but_never_the_home(
    name: str, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert [str(place.path) for place in hardening._caches({"KRB5CCNAME": name})] == opened


def test_a_writable_place_that_includes_the_home_is_too_broad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, link = tmp_path / "home" / "ada", tmp_path / "link"
    home.mkdir(parents=True)
    link.symlink_to(home)
    monkeypatch.setenv("HOME", str(home))
    assert all(map(hardening._broad, (home, home.parent, tmp_path, Path("/"), link)))
    assert not any(map(hardening._broad, (home / "log", tmp_path / "other", Path("/var/log"))))


def test_roots_daemon_may_write_to_chosen_devices_only() -> None:
    """Root with write access to all of /dev could write to disks."""
    places = {str(place.path): place.rights for place in hardening._for_everybody(root=True)}
    assert "/dev" not in places and "/dev/null" in places
    assert {rights for path, rights in places.items() if path.startswith("/dev/") and path != "/dev/shm"} == {2}
    assert {str(place.path) for place in hardening._for_everybody(root=False)} >= {"/dev", "/tmp"}

"""Processes that act for the machine: the uid that they have, what they are given, and how they end."""

from __future__ import annotations

import errno
import os
import pwd
import socket
import subprocess
from pathlib import Path

import pytest

from upcall.cli.quotatest import become_machines
from upcall.daemon.__main__ import REPLACED
from upcall.daemon.settings import DaemonSettings
from upcall.kernel import seccomp
from upcall.kernel.process import harden
from upcall.observe.doctor import daemon as checks
from upcall.observe.doctor.findings import Finding
from upcall.observe.doctor.system import Scene, StatusAnswer
from upcall.process import machine
from upcall.process.hardening import DaemonHardening, of_daemon
from upcall.process.settings import dumps
from upcall.protocols.request_key.explain.child import explained_as
from upcall.testing.played import PlayedBroker
from upcall.testing.processes import RunningBroker, Started, in_child

NOBODY = 65534
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


@pytest.fixture
def as_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's daemon has this uid."""
    monkeypatch.setattr(machine, "uid", lambda: NOBODY)


# --- replaced, or forced to end ------------------------------------------------------------------------------------


@pytest.fixture
def surroundings(folder: Path) -> dict[str, str]:
    (folder.parent / "run").mkdir(mode=0o700)
    return {"XDG_RUNTIME_DIR": str(folder.parent / "run"), "HOME": str(folder.parent)}


def the_real_one(folder: Path, name: str, surroundings: dict[str, str]) -> Started:
    return Started(["-m", "upcall.daemon", dumps(DaemonSettings(folder))], folder.parent / name, surroundings)


def test_a_replaced_daemon_ends_with_an_exit_code_of_its_own(
    broker: RunningBroker, folder: Path, surroundings: dict[str, str]
) -> None:
    with the_real_one(folder, "older.log", surroundings) as older:
        broker.registered(older.pid)
        with the_real_one(folder, "newer.log", surroundings) as newer:
            broker.registered(newer.pid)
            assert older.wait() == REPLACED


def test_a_daemon_told_to_quit_without_a_successor_exits_0_to_be_restarted(
    folder: Path, surroundings: dict[str, str]
) -> None:
    """`Restart=always` of its unit starts it again after exit status 0."""
    broker = PlayedBroker(folder)
    with the_real_one(folder, "daemon.log", surroundings) as daemon:
        broker.register()
        daemon.logged("daemon-registered")
        broker.quit()
        assert daemon.wait() == os.EX_OK


# --- without the network -------------------------------------------------------------------------------------------


@pytest.mark.skipif(bool(seccomp.why_not()), reason=f"seccomp: {seccomp.why_not()}")
def test_a_daemon_with_network_no_cannot_make_internet_sockets() -> None:
    def tried() -> list[int]:
        harden()
        assert of_daemon(DaemonHardening(network=False), "no", None).seccomp == "yes"
        return [_making(family) for family in (socket.AF_UNIX, socket.AF_NETLINK, socket.AF_INET, socket.AF_INET6)]

    assert in_child(tried) == [0, 0, errno.EAFNOSUPPORT, errno.EAFNOSUPPORT]


def _making(family: int) -> int:
    try:
        socket.socket(family, socket.SOCK_DGRAM).close()
    except OSError as error:
        return error.errno or -1
    return 0


@root_only
def test_root_tests_quota_sinks_as_the_machines_user(as_nobody: None) -> None:
    def become() -> list[object]:
        become_machines()
        try:
            Path("/etc/shadow").read_bytes()
        except PermissionError as error:
            return [*os.getresuid(), *os.getresgid(), 0 in os.getgroups(), error.errno, os.environ["XDG_RUNTIME_DIR"]]
        return []

    user = pwd.getpwuid(NOBODY)
    assert in_child(become) == [*[NOBODY] * 3, *[user.pw_gid] * 3, False, errno.EACCES, str(machine.FOLDER)]


def test_a_caller_that_is_not_root_tests_quota_sinks_under_its_own_uid(as_nobody: None) -> None:
    def become() -> int:
        become_machines()
        return os.getuid()

    me = 5001 if os.geteuid() == 0 else os.geteuid()
    assert in_child(become, 5001 if os.geteuid() == 0 else None) == me


@root_only
def test_explain_for_the_machine_runs_with_its_uid_and_its_keytab(
    as_nobody: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A handler that tells its surroundings; the credentials are played."""
    monkeypatch.setattr(machine, "credentials", lambda root=Path("/"): tmp_path)
    told = tmp_path / "told"
    told.touch()
    os.chown(told, NOBODY, NOBODY)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o001 == 0 and folder.is_relative_to("/tmp"):
            folder.chmod(0o711)
    really = subprocess.Popen
    code = f"import os; open({str(told)!r}, 'w').write(f'{{os.getuid()}} ' + os.environ['KRB5_KTNAME'])"

    def popen(words: list[str], **rest: object) -> object:
        return really(["/usr/bin/python3", "-I", "-c", code], **rest)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "Popen", popen)
    explained_as(NOBODY, "cifs.spnego", b"", contact=False)
    assert told.read_text() == f"{NOBODY} FILE:{tmp_path}/krb5.keytab"


# --- doctor --------------------------------------------------------------------------------------------------------


def findings(root: Path, told: int, *registered: int) -> list[Finding]:
    """Of a machine whose files are below `root`, and whose broker takes `told` for the machine's uid."""
    scene = Scene(machine=root)
    scene.uid = 0
    daemons = [{"uid": uid, "pid": uid + 7} for uid in registered]
    scene.__dict__["broker"] = StatusAnswer(1, 0, {"broker": {"uid": 0, "machine": told}, "daemons": daemons})
    return list(checks.machines(scene))


def test_the_doctor_reports_a_missing_and_a_running_machines_daemon(as_nobody: None, tmp_path: Path) -> None:
    (unit := tmp_path / "etc/systemd/system" / machine.UNIT).parent.mkdir(parents=True)
    unit.touch()
    (finding,) = findings(tmp_path, NOBODY)
    assert (finding.state, finding.command) == ("problem", f"systemctl restart {machine.UNIT}")
    (finding,) = findings(tmp_path, NOBODY, NOBODY)
    assert (finding.state, f"runs as uid {NOBODY}" in finding.what) == ("ok", True)


def test_the_doctor_reports_a_missing_keytab_and_an_older_copy(as_nobody: None, tmp_path: Path) -> None:
    copy = tmp_path / "run/credentials" / machine.UNIT / machine.KEYTAB
    copy.parent.mkdir(parents=True)
    copy.write_bytes(b"\x05\x02")
    _, finding = findings(tmp_path, NOBODY, NOBODY)
    assert "there is no /etc/krb5.keytab" in finding.what
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/krb5.keytab").write_bytes(b"\x05\x02new")
    _, finding = findings(tmp_path, NOBODY, NOBODY)
    assert "an older copy" in finding.what
    copy.write_bytes(b"\x05\x02new")
    (finding,) = findings(tmp_path, NOBODY, NOBODY)
    assert finding.state == "ok"


def test_the_doctor_notes_a_machines_daemon_that_runs_as_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "uid", lambda: 0)
    (finding,) = findings(tmp_path, 0, 0)
    assert finding.state == "note" and "no system user upcall" in finding.what


def test_the_doctor_suggests_a_reload_of_a_broker_with_another_machines_uid(as_nobody: None, tmp_path: Path) -> None:
    unit = tmp_path / "usr/lib/systemd/system/upcall-broker.service"
    unit.parent.mkdir(parents=True)
    unit.touch()
    (finding,) = findings(tmp_path, 0, 0)
    assert finding.command == "systemctl reload upcall-broker.service"


def test_units_and_program_name_the_folder_that_the_docs_name() -> None:
    units = Path(machine.__file__).parents[1] / "install" / "units"
    assert str(machine.FOLDER) == "/run/upcall/machine"
    assert "RuntimeDirectory=upcall/machine\n" in (units / "upcall-system-daemon.service.in").read_text()
    assert f"XDG_RUNTIME_DIR={machine.FOLDER}\n" in (units / "upcall.init.in").read_text()

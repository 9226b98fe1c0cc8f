"""Processes that act for the machine: as whom they run, what they are given, and when they stay away."""

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


def test_a_daemon_that_was_replaced_says_so_to_its_manager(
    broker: RunningBroker, folder: Path, surroundings: dict[str, str]
) -> None:
    with the_real_one(folder, "older.log", surroundings) as older:
        broker.registered(older.pid)
        with the_real_one(folder, "newer.log", surroundings) as newer:
            broker.registered(newer.pid)
            assert older.wait() == REPLACED


def test_one_that_is_told_to_go_and_has_no_successor_is_to_be_started_again(
    folder: Path, surroundings: dict[str, str]
) -> None:
    """It ends well, which `Restart=always` does not take for an answer."""
    broker = PlayedBroker(folder)
    with the_real_one(folder, "daemon.log", surroundings) as daemon:
        broker.register()
        daemon.logged("daemon-registered")
        broker.quit()
        assert daemon.wait() == os.EX_OK


# --- without the network -------------------------------------------------------------------------------------------


@pytest.mark.skipif(bool(seccomp.why_not()), reason=f"seccomp: {seccomp.why_not()}")
def test_a_daemon_of_keys_only_has_no_way_to_the_network() -> None:
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
def test_root_tries_the_sinks_as_the_machines_user(as_nobody: None) -> None:
    def become() -> list[object]:
        become_machines()
        try:
            Path("/etc/shadow").read_bytes()
        except PermissionError as error:
            return [*os.getresuid(), *os.getresgid(), 0 in os.getgroups(), error.errno, os.environ["XDG_RUNTIME_DIR"]]
        return []

    user = pwd.getpwuid(NOBODY)
    assert in_child(become) == [*[NOBODY] * 3, *[user.pw_gid] * 3, False, errno.EACCES, str(machine.FOLDER)]


def test_whoever_is_not_root_stays_who_they_are(as_nobody: None) -> None:
    def become() -> int:
        become_machines()
        return os.getuid()

    me = 5001 if os.geteuid() == 0 else os.geteuid()
    assert in_child(become, 5001 if os.geteuid() == 0 else None) == me


@root_only
def test_what_explains_the_machines_answer_is_given_what_its_daemon_has(
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


def test_the_doctor_finds_it_missing_and_well(as_nobody: None, tmp_path: Path) -> None:
    (unit := tmp_path / "etc/systemd/system" / machine.UNIT).parent.mkdir(parents=True)
    unit.touch()
    (finding,) = findings(tmp_path, NOBODY)
    assert (finding.state, finding.command) == ("problem", f"systemctl restart {machine.UNIT}")
    (finding,) = findings(tmp_path, NOBODY, NOBODY)
    assert (finding.state, f"runs as uid {NOBODY}" in finding.what) == ("ok", True)


def test_the_doctor_compares_the_keytab_with_its_copy(as_nobody: None, tmp_path: Path) -> None:
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


def test_the_doctor_says_that_root_parses_the_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "uid", lambda: 0)
    (finding,) = findings(tmp_path, 0, 0)
    assert finding.state == "note" and "no system user upcall" in finding.what


def test_the_doctor_finds_a_broker_that_knows_another(as_nobody: None, tmp_path: Path) -> None:
    (finding,) = findings(tmp_path, 0, 0)
    assert finding.command == "systemctl reload upcall-broker.service"

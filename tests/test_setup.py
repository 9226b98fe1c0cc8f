"""`upcall setup`, below a folder that stands for the whole system; for any user."""

from __future__ import annotations

import errno
import json
import os
import pwd
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from upcall.cli import main
from upcall.config import ConfigError
from upcall.daemon.__main__ import REPLACED
from upcall.install import completion, manifest, wanted
from upcall.install import services as installing
from upcall.install.manifest import FILE, Manifest
from upcall.install.manual.written import written
from upcall.install.services import OrderFailed, SetupPlan, install, kind_of, missing, undo
from upcall.install.wanted import KINDS, MAN, PAM, SYSTEMD, Orders, ServiceManager, content
from upcall.protocols.request_key import forwarder
from upcall.protocols.request_key.install.lines import replace
from upcall.protocols.request_key.install.our_file import FILE as REQUEST_KEY_FILE
from upcall.protocols.request_key.install.system import System

BROKER = "/etc/systemd/system/upcall-broker.service"
PYTHON = "/usr/bin/python3"
systemctl = pytest.mark.skipif(shutil.which("systemctl") is None, reason="systemctl is not installed (systemd)")


@pytest.fixture
def system(folder: Path) -> System:
    return System(folder.parent)


def plan_of(kind: ServiceManager, python: str) -> SetupPlan:
    """As `upcall setup` makes it."""
    return SetupPlan(kind, python, manual=written(main))


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> SetupPlan:
    """A plan whose service manager need not be told."""
    kind = SYSTEMD._replace(image=Orders())
    monkeypatch.setitem(wanted.KINDS, "systemd", kind)
    return plan_of(kind, PYTHON)


# Where systemd-sysusers writes: a user stays when what made it goes, for files may belong to it.
ACCOUNTS = ("passwd", "passwd-", "group", "group-", "shadow", "shadow-", "gshadow", "gshadow-", ".pwd.lock")


def everything(system: System) -> dict[str, tuple[int, bytes]]:
    """Folders, links and files, with their modes and contents; but no accounts."""
    found = {}
    for path in system.root.rglob("*"):
        if path.parent == system.at("/etc") and path.name in ACCOUNTS:
            continue
        data = str(path.readlink()).encode() if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        found[str(path)] = path.lstat().st_mode, data
    return found


def put(system: System, path: str, data: str) -> Path:
    place = system.at(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(data)
    return place


# --- done and undone -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pam", pytest.param("systemd", marks=systemctl)])
def test_setup_is_idempotent_and_undo_restores_everything(system: System, name: str) -> None:
    put(system, "/etc/passwd", "root:x:0:0::/root:/bin/sh\n")
    before, plan = everything(system), plan_of(KINDS[name], PYTHON)
    said = install(system, plan)
    alone = [*plan.kind.files, *completion.FILES.values()]
    assert [line for line in said if line.endswith(": written")] == [f"{path}: written" for path in alone]
    assert len([line for line in said if re.fullmatch(rf"{MAN}/man\d: written: \d+ pages", line)]) == 3
    assert len(said) < 20
    assert missing(system, plan) == []
    after = everything(system)
    assert install(system, plan) == []
    assert everything(system) == after
    for path, (_, mode) in plan.kind.files.items():
        assert stat.S_IMODE(system.at(path).stat().st_mode) == mode
    told = undo(system)
    assert everything(system) == before
    stays = "user upcall: left there, as packages do: files may belong to it"
    assert (stays in told) == (name == "systemd")
    assert undo(system) == []


@systemctl
def test_the_units_are_enabled(system: System) -> None:
    install(system, plan_of(SYSTEMD, PYTHON))
    for wants in (
        "system/multi-user.target.wants/upcall-broker.service",
        "system/multi-user.target.wants/upcall-quota.service",
        "user/default.target.wants/upcall-daemon.service",
    ):
        assert system.at(f"/etc/systemd/{wants}").is_symlink()


@systemctl
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make users, in an image, too")
def test_the_machines_daemon_has_a_user_who_may_write_to_terminals(system: System) -> None:
    install(system, plan_of(SYSTEMD, PYTHON))
    (user,) = [line.split(":") for line in system.at("/etc/passwd").read_text().splitlines() if "upcall" in line]
    assert user[0] == "upcall" and 0 < int(user[2]) < 1000 and user[6].endswith("nologin")
    groups = [line.split(":") for line in system.at("/etc/group").read_text().splitlines()]
    assert [line[3] for line in groups if line[0] == "tty"] == ["upcall"]


def test_a_persons_account_named_upcall_is_refused(system: System, silent: SetupPlan) -> None:
    put(system, "/etc/passwd", "upcall:x:1000:1000::/home/upcall:/bin/sh\n")
    with pytest.raises(ConfigError, match="is a person's account"):
        install(system, silent)
    assert not system.at(BROKER).exists()


def test_a_removed_system_user_is_reported_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(name: str) -> None:
        raise KeyError(name)

    monkeypatch.setattr(pwd, "getpwnam", nobody)
    monkeypatch.setattr(installing, "check", lambda system, plan: None)
    monkeypatch.setattr(installing, "wanted", lambda kind, python, manual: {})
    assert "user upcall: is not there" in missing(System(), plan_of(SYSTEMD, PYTHON))


def test_modes_do_not_depend_on_the_umask(system: System, silent: SetupPlan) -> None:
    before = os.umask(0o077)
    try:
        install(system, silent)
    finally:
        os.umask(before)
    assert stat.S_IMODE(system.at(BROKER).stat().st_mode) == 0o644
    assert stat.S_IMODE(system.at(BROKER).parent.stat().st_mode) == 0o755


def test_setup_restores_a_lost_file_and_follows_another_interpreter(system: System, silent: SetupPlan) -> None:
    install(system, silent)
    system.at(BROKER).unlink()
    assert missing(system, silent) == [f"{BROKER}: is not there"]
    assert install(system, silent) == [f"{BROKER}: written"]
    other = silent._replace(python="/opt/upcall/bin/python3")
    assert f"{BROKER}: says something else" in missing(system, other)
    install(system, other)
    assert b"ExecStart=/opt/upcall/bin/python3 -I" in system.at(BROKER).read_bytes()
    undo(system)
    assert not system.at("/etc").exists()


def test_undo_keeps_folders_that_hold_files_of_others(system: System, silent: SetupPlan) -> None:
    install(system, silent)
    other = put(system, "/etc/systemd/system/other.service", "")
    undo(system)
    assert other.exists() and not system.at("/etc/tmpfiles.d").exists()


# --- manual pages and completions ----------------------------------------------------------------------------------

PAGE = f"{MAN}/man1/upcall-status.1"


def test_pages_and_completions_are_where_man_and_the_shells_look(system: System, silent: SetupPlan) -> None:
    install(system, silent)
    assert system.at(PAGE).read_text().startswith(".TH UPCALL")
    assert "bash_complete" in system.at("/usr/local/share/bash-completion/completions/upcall").read_text()
    assert system.at("/usr/local/share/zsh/site-functions/_upcall").read_text().startswith("#compdef upcall")
    assert system.at("/usr/local/share/fish/vendor_completions.d/upcall.fish").exists()


def test_an_outdated_page_is_rewritten_without_restarting_services(system: System) -> None:
    kind = SYSTEMD._replace(image=Orders())
    install(system, plan_of(kind, PYTHON))
    older = b".TH OLDER 1\n"
    state = manifest.read(system.at(FILE))
    system.at(PAGE).write_bytes(older)
    gone = f"{MAN}/man1/upcall-gone.1"
    system.at(gone).write_bytes(older)
    known = {**state.files, PAGE: manifest.digest(older), gone: manifest.digest(older)}
    system.at(FILE).write_bytes(manifest.shown(state._replace(files=known)))
    plan = plan_of(kind._replace(image=Orders(on=(("false",),))), PYTHON)
    folder = f"{MAN}/man1"
    assert missing(system, plan) == [
        f"{folder}: says something else: upcall-status.1",
        f"{folder}: is no longer used: upcall-gone.1",
    ]
    assert install(system, plan) == [f"{folder}: written: upcall-status.1", f"{folder}: removed: upcall-gone.1"]
    assert missing(system, plan) == [] and not system.at(gone).exists()


def test_a_page_not_made_by_upcall_is_neither_replaced_nor_removed(system: System, silent: SetupPlan) -> None:
    put(system, PAGE, "mine")
    with pytest.raises(FileExistsError, match="not made by upcall"):
        install(system, silent)
    system.at(PAGE).unlink()
    install(system, silent)
    put(system, PAGE, "mine")
    assert f"{MAN}/man1: left there, for it is not as upcall made it: upcall-status.1" in undo(system)
    assert [path.name for path in system.at("/usr").rglob("*") if path.is_file()] == ["upcall-status.1"]


def test_undo_does_not_depend_on_what_would_be_installed(
    system: System, silent: SetupPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken installation can be removed."""
    install(system, silent)
    monkeypatch.setattr(installing, "wanted", None)
    undo(system)
    assert not system.at("/usr").exists() and not system.at("/etc").exists()


# --- what is not ours ----------------------------------------------------------------------------------------------


def test_a_file_not_made_by_upcall_stops_setup_before_any_change(system: System, silent: SetupPlan) -> None:
    put(system, BROKER, "[Service]\nExecStart=/bin/other\n")
    before = everything(system)
    with pytest.raises(FileExistsError, match="not made by upcall") as caught:
        install(system, silent)
    assert caught.value.filename == BROKER
    assert everything(system) == before


def test_an_edited_file_is_not_overwritten_and_not_removed(system: System, silent: SetupPlan) -> None:
    install(system, silent)
    put(system, BROKER, "[Service]\nExecStart=/bin/mine\n")
    with pytest.raises(FileExistsError, match="edited"):
        install(system, silent)
    assert f"{BROKER}: left there, for it is not as upcall made it" in undo(system)
    assert system.at(BROKER).read_text().endswith("mine\n")
    assert not system.at(FILE).exists()


def test_a_symbolic_link_is_not_followed(system: System, silent: SetupPlan) -> None:
    target = put(system, "/etc/precious", "x")
    system.at(BROKER).parent.mkdir(parents=True)
    system.at(BROKER).symlink_to(target)
    with pytest.raises(FileExistsError, match="symbolic link"):
        install(system, silent)
    assert target.read_text() == "x"


@pytest.mark.parametrize("data", ["", "{}", "[]", '{"kind": "pam"}', "nonsense"])
def test_a_broken_manifest_stops_setup_and_undo(system: System, silent: SetupPlan, data: str) -> None:
    put(system, FILE, data)
    with pytest.raises(ConfigError, match=re.escape(FILE)):
        install(system, silent)
    with pytest.raises(ConfigError, match=re.escape(FILE)):
        undo(system)


@pytest.mark.parametrize("path", ["etc/passwd", "/etc/../home/x"])
def test_a_manifest_with_a_path_that_setup_never_writes_is_refused(system: System, path: str) -> None:
    told = Manifest("systemd", {path: manifest.digest(b"")}, (), False, True)
    put(system, FILE, manifest.shown(told).decode())
    with pytest.raises(ConfigError, match="would not write"):
        undo(system)


def test_another_manager_is_refused_until_undo(system: System, silent: SetupPlan) -> None:
    install(system, silent)
    with pytest.raises(ConfigError, match=r"--undo. comes first"):
        install(system, plan_of(PAM, PYTHON))
    undo(system)
    install(system, plan_of(PAM, PYTHON))


# --- what root would run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("python", ["/home/alice/venv/bin/python", "/tmp/venv/bin/python", "/opt/my venv/bin/python"])
def test_an_interpreter_below_home_or_tmp_or_with_spaces_is_refused(system: System, python: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot rely|spaces"):
        install(system, plan_of(PAM, python))
    assert not system.at("/etc").exists()


def test_an_interpreter_that_others_can_change_is_refused(system: System) -> None:
    program = put(system, "/opt/python3", "")
    program.chmod(0o777)
    with pytest.raises(ConfigError, match="root would run it"):
        install(system, plan_of(PAM, "/opt/python3"))


def test_an_interpreter_that_users_cannot_reach_is_refused(system: System) -> None:
    put(system, "/opt/closed/bin/python3", "").chmod(0o755)
    system.at("/opt/closed").chmod(0o750)
    with pytest.raises(ConfigError, match="is closed to them"):
        install(system, plan_of(PAM, "/opt/closed/bin/python3"))


# --- when the service manager fails --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "why"),
    [
        (("sh", "-c", "echo out of order >&2; exit 3"), "ended with 3: out of order"),
        (("/no/such/program",), "No such file"),
    ],
)
def test_an_order_that_fails_can_be_repeated_and_undone(
    system: System, monkeypatch: pytest.MonkeyPatch, order: tuple[str, ...], why: str
) -> None:
    kind = SYSTEMD._replace(image=Orders(on=(order,), off=(order,)))
    monkeypatch.setitem(wanted.KINDS, "systemd", kind)
    with pytest.raises(OrderFailed, match=why):
        install(system, plan_of(kind, PYTHON))
    assert missing(system, plan_of(kind, PYTHON)) == ["systemd: does not know of it"]
    mended = kind._replace(image=Orders(on=(("true",),)))
    assert install(system, plan_of(mended, PYTHON)) == ["true"]
    assert any(why in line for line in undo(system))
    assert not system.at("/etc").exists()


def test_setup_interrupted_between_two_files_can_be_undone(
    system: System, silent: SetupPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest knows what was written."""
    really = replace

    def stops(path: Path, data: bytes, mode: int) -> None:
        if path == system.at("/etc/systemd/user/upcall-daemon.service"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        really(path, data, mode)

    monkeypatch.setattr(installing, "replace", stops)
    with pytest.raises(OSError, match="No space"):
        install(system, silent)
    monkeypatch.setattr(installing, "replace", really)
    assert system.at(BROKER).exists()
    undo(system)
    assert not system.at("/etc").exists()


# --- request-key ---------------------------------------------------------------------------------------------------


def forwarding(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    put(system, "/usr/lib/upcall/upcall-request-key", "").chmod(0o755)
    monkeypatch.setattr(forwarder, "command", lambda: ["/usr/lib/upcall/upcall-request-key"])


def test_setup_installs_request_keys_lines_and_undo_removes_them(
    system: System, silent: SetupPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwarding(system, monkeypatch)
    before = everything(system)
    assert f"{REQUEST_KEY_FILE}: written" in install(system, silent._replace(types=("cifs.spnego",)))
    assert f"{REQUEST_KEY_FILE}: removed" in undo(system)
    assert not system.at(REQUEST_KEY_FILE).exists()
    assert before.keys() <= everything(system).keys()


def test_undo_keeps_request_keys_lines_that_were_there_before(
    system: System, silent: SetupPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    from upcall.protocols.request_key.install import lines as requestkey

    forwarding(system, monkeypatch)
    planned = requestkey.plan(system, ("dns_resolver",), forwarder.command(), copy=False)
    requestkey.install(system, planned)
    before = everything(system)
    install(system, silent._replace(types=("cifs.spnego",)))
    undo(system)
    assert everything(system) == before


# --- the command ---------------------------------------------------------------------------------------------------


def run(system: System, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["setup", "--root", str(system.root), "--python", PYTHON, *arguments])


def test_the_command_checks_sets_up_and_undoes(system: System) -> None:
    assert run(system, "--manager", "pam", "--check").exit_code == 1
    done = run(system, "--manager", "pam")
    assert done.exit_code == 0 and "/etc/init.d/upcall: written" in done.output
    assert run(system, "--manager", "pam").output == "nothing to do\n"
    checked = run(system, "--manager", "pam", "--check", "--json")
    assert json.loads(checked.output) == {"manager": "pam", "ready": True, "lines": []}
    assert run(system, "--check").exit_code == 0
    assert run(system, "--undo").exit_code == 0
    assert run(system, "--undo").output == "nothing to do\n"


def test_each_kind_of_failure_has_its_exit_code(system: System) -> None:
    assert run(system, "--check", "--undo").exit_code == os.EX_USAGE
    assert run(system, "--request-key", "none", "--request-key", "cifs.spnego").exit_code == os.EX_USAGE
    put(system, "/etc/init.d/upcall", "")
    assert run(system, "--manager", "pam").exit_code == os.EX_CANTCREAT
    put(system, FILE, "")
    assert run(system, "--manager", "pam").exit_code == os.EX_CONFIG


def test_systemd_is_chosen_where_it_is_installed_and_pam_elsewhere(system: System) -> None:
    assert kind_of(system.root) is PAM
    put(system, "/usr/lib/systemd/systemd", "")
    assert kind_of(system.root) is SYSTEMD


# --- what is written -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "path"), [(kind.name, path) for kind in KINDS.values() for path in kind.files])
def test_no_template_keeps_a_placeholder(name: str, path: str) -> None:
    text = content(KINDS[name], path, PYTHON).decode()
    assert "$python" not in text and "$$" not in text


def test_the_init_script_is_valid_shell_and_refuses_unknown_arguments() -> None:
    script = content(PAM, "/etc/init.d/upcall", PYTHON)
    assert subprocess.run(["sh", "-n"], input=script, capture_output=True, check=False).stderr == b""
    asked = subprocess.run(["sh", "-s", "nonsense"], input=script, capture_output=True, check=False)
    assert asked.returncode == os.EX_USAGE


# Exposure as systemd 252 counts it, at most: 0 is none. docs/operations.md says what each rest is for.
EXPOSURE = {
    "upcall-broker.service": 1.6,
    "upcall-quota.service": 2.0,
    "upcall-mount.service": 1.9,
    "upcall-system-daemon.service": 1.9,
    "upcall-root-daemon.service": 2.0,
    "upcall-daemon.service": 6.5,
}


def test_units_are_always_restarted_except_a_replaced_daemon(system: System) -> None:
    """Two daemons that restarted after being replaced would replace each other for ever."""
    for path in SYSTEMD.files:
        text = content(SYSTEMD, path, PYTHON).decode()
        if "Type=notify" in text:
            assert "Restart=always\n" in text and "StartLimitBurst=" in text
            prevented = f"RestartPreventExitStatus={REPLACED}\n" in text
            assert prevented == ("daemon" in text.partition("ExecStart=")[2].partition("\n")[0])


@pytest.mark.parametrize("unit", EXPOSURE)
def test_no_unit_is_more_exposed_than_recorded(system: System, unit: str) -> None:
    path = next(path for path in SYSTEMD.files if path.endswith(f"/{unit}"))
    assert exposure(system, unit, content(SYSTEMD, path, sys.executable).decode()) <= EXPOSURE[unit]


def exposure(system: System, unit: str, text: str) -> float:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed (Debian: systemd)")
    file = system.root / unit
    file.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    if found is None:
        pytest.skip(f"this systemd-analyze says nothing: {done.stderr.strip()[:200]}")
    assert not done.stderr, "a line that systemd does not understand"
    return float(found[1])

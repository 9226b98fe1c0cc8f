"""Broken installations: `upcall doctor` reports each, and its remedy fixes it."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from upcall import __version__, config
from upcall.core.messages import Answer
from upcall.kernel import keyring
from upcall.kernel.local import listen
from upcall.keymodule import GROUP
from upcall.keys import plugins as modules
from upcall.keys.replacing import Replacement
from upcall.keys.store import KeyStore
from upcall.observe.doctor import broker as broker_checks
from upcall.observe.doctor import daemon as daemon_checks
from upcall.observe.doctor.findings import OK, PROBLEM, Finding
from upcall.observe.doctor.system import Scene
from upcall.observe.doctor.table import CHECKS, bounded
from upcall.protocols.ecryptfs.authtok import AuthTok, pack_auth_tok
from upcall.protocols.request_key import forwarder
from upcall.protocols.request_key.install.our_file import FILE
from upcall.testing.processes import RunningBroker, StartDaemon, in_child, until
from upcall.wire.envelope import MAX_MESSAGE, pack_response, take_request

BIN = Path(sys.executable).parent
NOBODY = 65534
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture(autouse=True)
def home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders of our own, where the played daemons look, too."""
    run = folder.parent / "run"
    run.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(run))
    monkeypatch.setenv("XDG_DATA_HOME", str(folder.parent / "data"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder.parent / "config"))
    monkeypatch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")
    monkeypatch.setattr(config, "SYSTEM", folder.parent / "system.toml")
    return folder.parent


def found(check: str, scene: Scene) -> list[Finding]:
    one = next(one for one in CHECKS if one.name == check)
    return bounded(one, scene)


def problems(check: str, scene: Scene) -> list[Finding]:
    return [finding for finding in found(check, scene) if finding.state == PROBLEM]


def well(check: str, scene: Scene) -> bool:
    findings = found(check, scene)
    return bool(findings) and all(finding.state == OK for finding in findings)


def the_problem(check: str, scene: Scene, words: str) -> Finding:
    """There is exactly one, and it says so."""
    (finding,) = problems(check, scene)
    assert words in finding.what
    return finding


def mend(finding: Finding) -> None:
    assert finding.command
    subprocess.run(["/bin/sh", "-c", finding.command], check=True, timeout=60)


@contextlib.contextmanager
def started(finding: Finding) -> Iterator[None]:
    """Its command goes on in the background until we end it."""
    assert finding.command.endswith(" &")
    process = subprocess.Popen(shlex.split(finding.command.removesuffix("&")), stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def played(path: Path, status: dict[str, object] | None) -> Iterator[None]:
    """A process that listens there and answers with this status; with None it never answers."""
    listener = listen(path, 0o600)
    listener.setblocking(True)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                held.append(connection)
                data = connection.recv(MAX_MESSAGE)
                if data and status is not None:
                    asked = take_request(data)
                    connection.send(pack_response(asked.seq, asked.index, Answer(json.dumps(status).encode())))

    held: list[socket.socket] = []
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(60)
        for one in (listener, *held):
            one.close()


# --- the broker ------------------------------------------------------------------------------------------------


def test_a_missing_broker_is_reported_and_its_remedy_starts_one(folder: Path) -> None:
    finding = the_problem("broker", Scene(folder), "no broker at")
    with started(finding):
        until(lambda: not problems("broker", Scene(folder)), "a broker that is well")


def test_a_stale_broker_socket_is_reported_and_its_remedy_starts_a_broker(broker: RunningBroker, folder: Path) -> None:
    broker.kill()
    finding = the_problem("broker", Scene(folder), "Connection refused")
    with started(finding):
        until(lambda: not problems("broker", Scene(folder)), "a broker that is well")


def test_a_stopped_broker_is_reported_and_its_remedy_continues_it(broker: RunningBroker, folder: Path) -> None:
    assert found("broker", Scene(folder))[0].state == OK
    broker.stop()
    mend(the_problem("broker", Scene(folder), f"pid {broker.pid}) is stopped"))
    assert not problems("broker", Scene(folder))


def test_a_broker_that_does_not_answer_is_reported(folder: Path) -> None:
    folder.mkdir()
    with played(folder / "broker.sock", None):
        the_problem("broker", Scene(folder), "does not answer: no answer within 1 s")


def test_a_broker_of_another_version_is_reported(folder: Path) -> None:
    folder.mkdir()
    with played(folder / "broker.sock", {"broker": {"version": "0.0.1"}}):
        the_problem("broker", Scene(folder), f"is of version 0.0.1, this is {__version__}")


@pytest.mark.parametrize(
    ("name", "mode", "words"),
    [
        (".", 0o777, "others can get at it"),
        ("broker.sock", 0o000, "others cannot reach it"),
        ("registration.sock", 0o000, "others cannot reach it"),
    ],
)
def test_a_wrong_mode_in_the_runtime_folder_is_reported_and_fixed(
    broker: RunningBroker, folder: Path, name: str, mode: int, words: str
) -> None:
    assert not problems("folder", Scene(folder))
    scene = Scene(folder)
    assert scene.broker.pid  # asked before others cannot reach it
    (folder / name).chmod(mode)
    mend(the_problem("folder", scene, words))
    assert not problems("folder", Scene(folder))


@root_only
@pytest.mark.parametrize("name", ["registration.sock", "broker.sock"])
def test_a_wrong_owner_in_the_runtime_folder_is_reported_and_fixed(
    broker: RunningBroker, folder: Path, name: str
) -> None:
    os.chown(folder / name, NOBODY, 0)
    mend(the_problem("folder", Scene(folder), "belongs to uid 65534"))
    assert not problems("folder", Scene(folder))


@root_only
def test_a_forwarders_socket_open_to_others_is_reported_and_fixed(broker: RunningBroker, folder: Path) -> None:
    (folder / "request-key.sock").chmod(0o666)
    mend(the_problem("folder", Scene(folder), "others can get at it"))
    assert not problems("folder", Scene(folder))


def test_a_device_held_by_another_process_is_reported_and_freed(folder: Path, home: Path) -> None:
    """The broker's status and /proc are played; the other process has /dev/ecryptfs open there."""
    made = machine(home)
    (made / "dev" / "ecryptfs").touch()
    with subprocess.Popen(["sleep", "30"]) as other:
        (made / "proc" / str(other.pid) / "fd").mkdir(parents=True)
        (made / "proc" / str(other.pid) / "fd" / "3").symlink_to("/dev/ecryptfs")
        (made / "proc" / str(other.pid) / "comm").write_text("ecryptfsd\n")
        why = "another daemon of this uid has it"
        told = {"uid": 0, "sources": ["local", "ecryptfs"]}
        folder.mkdir()
        device = {"uid": os.geteuid(), "open": False, "why": why}
        with played(folder / "broker.sock", {"broker": told, "devices": [device]}):
            finding = the_problem("device", Scene(folder, machine=made), why)
        assert finding.remedy == f"pid {other.pid} ('ecryptfsd') has it open"
        mend(finding)
        assert other.wait(60) == -signal.SIGTERM
    (made / "dev" / "ecryptfs").unlink()
    with played(folder / "broker.sock", {"broker": told, "devices": [device]}):
        assert not problems("device", Scene(folder, machine=made))


@pytest.mark.parametrize("listening", [True, False])
def test_a_quota_source_that_does_not_listen_is_reported(folder: Path, listening: bool) -> None:
    folder.mkdir()
    quota = {"listening": listening, "why": "the kernel said no", "lost": 0}
    with played(folder / "broker.sock", {"broker": {"uid": 0}, "quota": quota}):
        found_ones = problems("quota", Scene(folder))
    assert ["the kernel said no" in one.what for one in found_ones] == ([] if listening else [True])


def test_the_start_command_is_systemctl_if_our_units_are_installed(folder: Path, home: Path) -> None:
    made = machine(home)
    scene = Scene(machine=made)
    assert (broker_checks.start_command(scene), daemon_checks.start_command(scene)) == (
        "upcall broker &",
        "upcall daemon &",
    )
    for kind, unit in (
        ("system", broker_checks.UNIT),
        ("system", daemon_checks.ROOT_UNIT),
        ("user", daemon_checks.UNIT),
    ):
        (made / "usr/lib/systemd" / kind).mkdir(parents=True, exist_ok=True)
        (made / "usr/lib/systemd" / kind / unit).touch()
    assert broker_checks.start_command(scene) == "systemctl start upcall-broker.service"
    scene.uid = 0
    assert daemon_checks.start_command(scene) == "systemctl restart upcall-root-daemon.service"
    scene.uid = 1000
    assert daemon_checks.start_command(scene) == "systemctl --user restart upcall-daemon.service"
    assert daemon_checks.start_command(Scene(folder, machine=made)).startswith("upcall daemon --runtime")


@pytest.mark.parametrize("script", ["/etc/init.d/upcall-broker", "/etc/init.d/upcall"])
def test_the_start_command_is_the_init_script_where_systemd_does_not_run(home: Path, script: str) -> None:
    made = machine(home)
    for path in (
        "usr/lib/systemd/system/" + broker_checks.UNIT,
        "usr/lib/systemd/user/" + daemon_checks.UNIT,
        script[1:],
    ):
        (made / path).parent.mkdir(parents=True, exist_ok=True)
        (made / path).touch()
    scene = Scene(machine=made)
    scene.uid = 1000
    assert broker_checks.start_command(scene) == f"{script} start"
    assert daemon_checks.start_command(scene) == "upcall daemon &"
    (made / "run/systemd/system").mkdir(parents=True)
    assert broker_checks.start_command(scene) == "systemctl start upcall-broker.service"
    assert daemon_checks.start_command(scene) == "systemctl --user restart upcall-daemon.service"


# --- the daemon ------------------------------------------------------------------------------------------------


def test_a_missing_daemon_is_reported_and_its_remedy_starts_one(broker: RunningBroker, folder: Path) -> None:
    finding = the_problem("daemon", Scene(folder), "has no daemon")
    with started(finding):
        until(lambda: well("registration", Scene(folder)), "it is registered")
        until(lambda: well("daemon", Scene(folder)), "it answers")


def test_a_stopped_daemon_is_reported_and_its_remedy_continues_it(
    broker: RunningBroker, folder: Path, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon(broker, control=True)
    assert not problems("daemon", Scene(folder))
    daemon.stop()
    mend(the_problem("daemon", Scene(folder), f"pid {daemon.pid}) is stopped"))
    assert not problems("daemon", Scene(folder))


def test_a_stopped_daemon_without_a_control_socket_is_found_by_registration(
    broker: RunningBroker, folder: Path, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon(broker)
    daemon.stop()
    mend(the_problem("registration", Scene(folder), f"pid {daemon.pid}) is stopped"))
    assert not problems("registration", Scene(folder))


def test_a_daemon_that_does_not_answer_is_reported_and_replaced(
    broker: RunningBroker, folder: Path, home: Path
) -> None:
    (home / "run" / "upcall").mkdir(mode=0o700)
    with played(home / "run" / "upcall" / "daemon.sock", None):
        finding = the_problem("daemon", Scene(folder), "does not answer")
        with started(finding):
            until(lambda: not problems("daemon", Scene(folder)), "a daemon that is well")


def test_an_unregistered_daemon_of_another_version_is_reported_and_replaced(
    broker: RunningBroker, folder: Path, home: Path
) -> None:
    (home / "run" / "upcall").mkdir(mode=0o700)
    with played(home / "run" / "upcall" / "daemon.sock", {"pid": 1, "version": "0.0.1", "keys": []}):
        the_problem("registration", Scene(folder), "is not registered with this broker")
        finding = the_problem("daemon", Scene(folder), "is of version 0.0.1")
        with started(finding):
            until(lambda: well("daemon", Scene(folder)), "a daemon that is well")
            until(lambda: well("registration", Scene(folder)), "which is registered")


# --- keys ------------------------------------------------------------------------------------------------------


@pytest.fixture
def key(home: Path) -> Iterator[Path]:
    """A key that was made, and is well; gives its file. Its auth token goes afterwards."""
    command = [str(BIN / "upcall"), "key", "generate", "--no-passphrase", "work"]
    subprocess.run(command, check=True, timeout=60, capture_output=True)
    signature = _entry(home).split('signature = "')[1][:16]
    try:
        yield next((home / "data" / "upcall" / "keys").glob("work.pem"))
    finally:
        keyring.ensure_user_keyring_linked()
        if (serial := keyring.find(signature)) is not None:
            keyring.unlink(serial)


def _entry(home: Path) -> str:
    return (home / "data" / "upcall" / "keys" / "work.toml").read_text()


def test_a_key_file_that_others_can_read_is_reported_and_fixed(key: Path, folder: Path) -> None:
    assert not problems("key-files", Scene(folder))
    key.chmod(0o644)
    mend(the_problem("key-files", Scene(folder), "has mode 0644: others can get at it"))
    assert not problems("key-files", Scene(folder))


def test_a_key_entry_that_others_can_read_is_reported_and_fixed(key: Path, folder: Path) -> None:
    key.with_suffix(".toml").chmod(0o640)
    mend(the_problem("key-files", Scene(folder), "has mode 0640"))
    assert not problems("key-files", Scene(folder))


def test_a_key_store_that_others_can_write_to_is_reported_and_fixed(key: Path, folder: Path) -> None:
    key.parent.chmod(0o777)
    mend(the_problem("key-files", Scene(folder), "has mode 0777"))
    assert not problems("key-files", Scene(folder))


@root_only
def test_a_key_file_of_another_user_is_reported_and_fixed(key: Path, folder: Path) -> None:
    os.chown(key, NOBODY, 0)
    mend(the_problem("key-files", Scene(folder), "belongs to uid 65534"))
    assert not problems("key-files", Scene(folder))


def test_a_lost_key_file_is_reported_with_advice_about_backups(key: Path, folder: Path) -> None:
    key.unlink()
    assert "backup" in the_problem("key-files", Scene(folder), "is not there").remedy


def test_an_interrupted_change_of_a_key_is_reported_and_resumed(key: Path, folder: Path) -> None:
    store = KeyStore(key.parent)
    replacement = Replacement(store, store.load("work"))
    replacement.begin()
    replacement.staged.touch(0o600)
    finding = the_problem("key-files", Scene(folder), "a change of the key work's passphrase was interrupted")
    assert finding.command == "upcall key resume"
    mend(finding)
    assert not problems("key-files", Scene(folder))
    assert sorted(path.name for path in key.parent.iterdir()) == ["work.pem", "work.toml"]


def test_a_key_file_that_no_key_uses_is_noted(key: Path, folder: Path) -> None:
    other = key.with_name("other.pem")
    other.touch(0o600)
    notes = [finding for finding in found("key-files", Scene(folder)) if finding.state != OK]
    assert [finding.what for finding in notes] == [f"no key uses {other}"]


def test_a_key_file_on_a_mount_that_needs_its_key_is_reported(key: Path, folder: Path, home: Path) -> None:
    """The played mountinfo says that the keys lie on an eCryptfs mount that one of them opens."""
    signature = _entry(home).split('signature = "')[1][:16]
    device = key.stat().st_dev
    mountinfo = home / "machine/proc/self/mountinfo"
    mountinfo.parent.mkdir(parents=True)
    line = f"36 1 {os.major(device)}:{os.minor(device)} / /home rw - ecryptfs /lower rw,ecryptfs_sig="
    mountinfo.write_text(f"{line}{'0' * 16}\n")
    assert not problems("key-files", Scene(folder, machine=home / "machine"))
    mountinfo.write_text(f"{line}{signature}\n")
    found = the_problem("key-files", Scene(folder, machine=home / "machine"), f"it needs the key {signature}")
    assert str(key) in found.what
    assert "copy it" in found.remedy


def test_a_damaged_key_entry_is_reported(key: Path, folder: Path) -> None:
    key.with_suffix(".toml").write_text("module = 5\n")
    the_problem("key-files", Scene(folder), "work.toml")


def test_a_missing_auth_token_is_reported_and_added(key: Path, folder: Path, home: Path) -> None:
    signature = _entry(home).split('signature = "')[1][:16]
    keyring.ensure_user_keyring_linked()
    serial = keyring.find(signature)
    assert serial is not None
    keyring.unlink(serial)
    (finding,) = [one for one in found("auth-tokens", Scene(folder)) if "work" in one.what]
    mend(finding)
    assert not any("work" in one.what for one in found("auth-tokens", Scene(folder)))


def test_an_auth_token_of_a_missing_key_module_is_reported(folder: Path) -> None:
    signature = os.urandom(8).hex()
    serial = keyring.add_user_key(signature, pack_auth_tok(AuthTok(signature, "moonbeam", b"")))
    try:
        assert any(signature in one.what and "moonbeam" in one.what for one in problems("auth-tokens", Scene(folder)))
    finally:
        keyring.unlink(serial)


def test_a_malformed_auth_token_is_reported(folder: Path) -> None:
    signature = os.urandom(8).hex()
    serial = keyring.add_user_key(signature, b"short")
    try:
        assert any(signature in one.what for one in problems("auth-tokens", Scene(folder)))
    finally:
        keyring.unlink(serial)


def test_a_session_keyring_without_a_link_to_the_user_keyring_is_reported_and_fixed(folder: Path) -> None:
    def look() -> list[object]:
        keyring.join_session_and_link_user_keyring()
        keyring._call("KEYCTL_JOIN_SESSION_KEYRING", 1, 0)  # a new one, with nothing in it
        (finding,) = [one for one in found("keyrings", Scene(folder)) if "does not lead" in one.what]
        mend(finding)
        return [one.what for one in found("keyrings", Scene(folder)) if one.state != OK]

    assert in_child(look) == []


def test_a_revoked_session_keyring_is_reported(folder: Path) -> None:
    def look() -> list[object]:
        keyring._call("KEYCTL_JOIN_SESSION_KEYRING", 1, 0)
        keyring.revoke(keyring.SESSION_KEYRING)
        return [one._asdict() for one in problems("keyrings", Scene(folder))]

    (finding,) = in_child(look)
    assert "revoked" in finding["what"] and finding["command"] == "keyctl new_session"


@pytest.mark.parametrize("figures", ["3/3 190/200 28/20000", "3/3 3/200 19000/20000"])
def test_a_nearly_used_up_key_quota_is_reported(folder: Path, home: Path, figures: str) -> None:
    machine = home / "machine"
    (machine / "proc").mkdir(parents=True)
    users = machine / "proc" / "key-users"
    users.write_text(f"    0: 9 9/9 9/1000000 9/25000000\n{os.getuid():5}:     3 {figures}\n")
    if os.getuid() == 0:
        users.write_text(f"    0:     3 {figures}\n")
    finding = the_problem("key-quota", Scene(folder, machine=machine), "are used")
    assert finding.command.startswith("sysctl -w kernel.keys.")


# --- what is installed and written down -----------------------------------------------------------------------


def test_a_configuration_that_others_can_write_to_is_reported_and_fixed(folder: Path) -> None:
    file = config.user_file()
    file.parent.mkdir(parents=True)
    file.write_text('[plugins]\nallow = ["openssl"]\n')
    file.chmod(0o666)
    mend(the_problem("configuration", Scene(folder), "lets others write to it"))
    assert not problems("configuration", Scene(folder))


@root_only
def test_a_configuration_of_another_user_is_reported_and_fixed(folder: Path) -> None:
    file = config.user_file()
    file.parent.mkdir(parents=True)
    file.write_text("")
    os.chown(file, NOBODY, 0)
    mend(the_problem("configuration", Scene(folder), "65534"))
    assert not problems("configuration", Scene(folder))


def test_an_invalid_configuration_is_reported_by_file_and_key(folder: Path) -> None:
    file = config.user_file()
    file.parent.mkdir(parents=True)
    file.write_text("[plugins]\nalow = []\n")
    finding = the_problem("configuration", Scene(folder), "alow")
    assert str(file) in finding.remedy


def test_missing_edited_or_shadowed_request_key_lines_are_reported_and_fixed(folder: Path, home: Path) -> None:
    if not forwarder.PROGRAM.exists():
        pytest.skip("the forwarder is not built")
    image = home / "image"
    (image / "sbin").mkdir(parents=True)
    (image / "sbin" / "request-key").write_text("")
    (image / "sbin" / "request-key").chmod(0o755)
    finding = next(one for one in found("request-key", Scene(folder, image)) if "cifs.spnego" in one.what)
    subprocess.run(["/bin/sh", "-c", f"{finding.command} --copy"], check=True, timeout=60)
    assert {one.state for one in found("request-key", Scene(folder, image))} == {OK}

    lines = image / FILE.lstrip("/")
    lines.write_bytes(lines.read_bytes() + b"create user * * /bin/false\n")
    mend(the_problem("request-key", Scene(folder, image), "was edited"))
    assert not problems("request-key", Scene(folder, image))

    subprocess.run(["/bin/sh", "-c", f"{finding.command} --copy"], check=True, timeout=60)
    other = lines.with_name("other.conf")
    other.write_text("create cifs.spnego ver=0x2;host=any.invalid* * /usr/sbin/cifs.upcall %k\n")
    assert the_problem("request-key", Scene(folder, image), "/etc/request-key.d/other.conf:1")
    other.unlink()
    (image / "sbin" / "request-key").unlink()
    assert the_problem("request-key", Scene(folder, image), "is not there").command == "apt-get install keyutils"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import nothing_of_this_name", "ModuleNotFoundError"),
        ("class M:\n name = 'broken'\n api = 99\n open = print\nM = M()", "version 99 of the protocol"),
        ("import os; os.abort()", "ended its process with -6"),
    ],
)
def test_a_plugin_that_cannot_be_loaded_is_reported_with_the_reason(
    folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    (home / "broken.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(home))
    broken = modules.Installed("broken", GROUP, "broken:M", False, "upcall-broken", "1")
    monkeypatch.setattr(modules, "installed", lambda: [broken])
    the_problem("plugins", Scene(folder), words)


def test_a_plugin_whose_import_hangs_is_reported(folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "broken.py").write_text("import signal; signal.pause()")
    monkeypatch.setenv("PYTHONPATH", str(home))
    monkeypatch.setattr("upcall.observe.doctor.plugins.PATIENCE", 0.5)
    broken = modules.Installed("broken", GROUP, "broken:M", False, "upcall-broken", "1")
    monkeypatch.setattr(modules, "installed", lambda: [broken])
    the_problem("plugins", Scene(folder), "is not imported within")


def test_a_missing_kerberos_library_is_reported_with_its_package(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules, "handlers", lambda: {"cifs.spnego": "upcall_spnego:handler"})
    monkeypatch.setattr("upcall.observe.doctor.plugins.LIBRARY", "libgssapi_of_nobody.so.2")
    finding = the_problem("kerberos", Scene(folder), "has no Kerberos library")
    assert finding.command == "apt-get install libgssapi-krb5-2"


# --- the kernel ------------------------------------------------------------------------------------------------


def machine(home: Path, **files: str) -> Path:
    """/proc/filesystems is filesystems="...", and so on."""
    made = home / "machine"
    for name, text in {"filesystems": "nodev\tproc\n", "misc": "", **files}.items():
        path = made / "proc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (made / "dev").mkdir()
    return made


def test_ecryptfs_that_is_not_loaded_or_missing_is_reported(folder: Path, home: Path) -> None:
    made = machine(home)
    modules_of = made / "lib" / "modules" / os.uname().release
    modules_of.mkdir(parents=True)
    (modules_of / "modules.dep").write_text("kernel/fs/ecryptfs/ecryptfs.ko.xz: kernel/lib/x.ko\n")
    (finding,) = found("ecryptfs", Scene(folder, machine=made))
    assert finding.command == "modprobe ecryptfs"
    (modules_of / "modules.dep").write_text("")
    (finding,) = found("ecryptfs", Scene(folder, machine=made))
    assert finding.what == "this kernel has no eCryptfs"


def test_an_ecryptfs_without_messaging_is_reported(folder: Path, home: Path) -> None:
    made = machine(home, filesystems="nodev\tecryptfs\n", misc="200 tun\n")
    the_problem("ecryptfs", Scene(folder, machine=made), "asks no daemons")


@root_only
def test_a_missing_or_open_ecryptfs_device_is_reported_and_fixed(folder: Path, home: Path) -> None:
    made = machine(home, filesystems="nodev\tecryptfs\n", misc=" 61 ecryptfs\n")
    try:
        mend(the_problem("ecryptfs", Scene(folder, machine=made), "is not there"))
    except subprocess.CalledProcessError:
        pytest.skip("this root may make no devices")
    assert not problems("ecryptfs", Scene(folder, machine=made))
    (made / "dev" / "ecryptfs").chmod(0o666)
    mend(the_problem("ecryptfs", Scene(folder, machine=made), "has mode 0666"))
    assert not problems("ecryptfs", Scene(folder, machine=made))


def test_a_kernel_without_cifs_upcalls_is_reported(folder: Path, home: Path) -> None:
    made = machine(home)
    (made / "boot").mkdir()
    (made / "boot" / f"config-{os.uname().release}").write_text("CONFIG_DNS_RESOLVER=m\n")
    findings = found("kernel-upcalls", Scene(folder, machine=made))
    said = {finding.what: finding.state for finding in findings}
    assert said["this kernel has no CONFIG_CIFS_UPCALL"] != OK
    assert said["the kernel can ask for names"] == OK

"""The machine's daemon and root's, after `upcall setup`, with a real systemd as process 1: as whom they run, what is
handed over to them, and that whatever ends one is not its end."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.login_scene import SLOW, registered, require_setup
from tests.kernel.test_login_systemd import DROP_INS, SERVICES, systemctl
from upcall.process import machine
from upcall.testing.lab.stage import serving, wait_until

# Services start one after the other, each a Python on an emulated processor.
pytestmark = pytest.mark.time_limit(5 * SLOW)


@pytest.fixture(scope="module")
def services() -> Iterator[None]:
    if Path("/proc/1/comm").read_text() != "systemd\n":
        pytest.skip("systemd is not process 1")
    require_setup()
    for path, text in DROP_INS.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text)
    said = systemctl("start", "systemd-journald.service", "dbus.service")
    assert not said, said
    command = [sys.executable, "-I", "-m", "upcall", "setup", "--request-key", "none"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3 * SLOW)
    assert done.returncode == 0, done.stderr
    try:
        yield
    finally:
        with Path("/results/journal").open("wb") as kept:
            subprocess.run(["journalctl", "--no-pager"], stdout=kept, check=False, timeout=SLOW)


def main_pid(unit: str) -> int:
    return int(systemctl("show", "--value", "--property=MainPID", unit))


def test_the_services_run(services: None) -> None:
    wait_until(lambda: systemctl("is-active", *SERVICES).split() == ["active", "active"], "the services", SLOW)
    uid = pwd.getpwnam(machine.USER).pw_uid
    assert 0 < uid < machine.PEOPLE
    pid = registered(uid)
    assert pid == main_pid("upcall-system-daemon.service")
    said = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    assert said["Uid"].split() == [str(uid)] * 4
    assert (int(said["CapPrm"], 16), int(said["CapBnd"], 16), said["NoNewPrivs"]) == (0, 0, "1")
    # Root has no keys here, and so no daemon.
    assert systemctl("is-active", "upcall-root-daemon.service") == "inactive"
    assert serving(0) is None


def test_the_machines_keytab_is_handed_over_and_a_new_one_again(services: None) -> None:
    """As the user of the daemon reads it. There was none when the daemon started."""
    handed = Path(f"/run/credentials/{machine.UNIT}/{machine.KEYTAB}")
    user = pwd.getpwnam(machine.USER)
    keytab = Path("/etc/krb5.keytab")

    def read() -> bytes:
        return subprocess.run(
            ["cat", handed], capture_output=True, check=False, timeout=SLOW,
            user=user.pw_uid, group=user.pw_gid, extra_groups=[],
        ).stdout  # fmt: skip

    assert read() == b"\x05\x02"
    before = registered(user.pw_uid)
    keytab.touch(0o600)
    keytab.write_bytes(b"\x05\x02 another")
    try:
        wait_until(lambda: read() == b"\x05\x02 another", "the keytab handed over", SLOW)
        registered(user.pw_uid, other_than=[before])
        assert handed.stat().st_mode & 0o007 == 0
    finally:
        keytab.unlink()


def test_the_machines_daemon_comes_again_whatever_ended_it(services: None) -> None:
    """A clean end that nobody asked its manager for, too."""
    uid = pwd.getpwnam(machine.USER).pw_uid
    ended = registered(uid)
    os.kill(ended, signal.SIGTERM)
    registered(uid, other_than=[ended])


def test_roots_keys_have_a_daemon_without_the_network(services: None) -> None:
    keys = Path("/root/.local/share/upcall/keys")
    keys.mkdir(parents=True, exist_ok=True)
    (keys / "any.toml").touch(0o600)
    said = systemctl("start", "upcall-root-daemon.service")
    assert not said, said
    assert registered(0) == main_pid("upcall-root-daemon.service")
    systemctl("stop", "upcall-root-daemon.service")
    (keys / "any.toml").unlink()

"""Quotas with our units: what the source's sandbox lets through is enough to hear the kernel, and to look."""

from __future__ import annotations

import json
import pwd
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.quota_scene import MB, NO_ROOM, Disk, disk, fill
from tests.kernel.test_units import INIT, SERVICES, SLOW, Systemd, systemd  # noqa: F401 - a fixture
from upcall.process import machine
from upcall.testing.lab.stage import person, wait_until

pytestmark = pytest.mark.skipif(not INIT.exists(), reason="systemd is not installed")


@pytest.fixture(scope="module")
def drive() -> Iterator[Disk]:
    """Not in /tmp: the units have one of their own."""
    folder = Path("/srv/quota-disk")
    folder.mkdir(parents=True)
    with disk("ext4", folder) as made:
        yield made
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def units(drive: Disk, request: pytest.FixtureRequest) -> Systemd:
    """They start when the disk is there: process 1 has a mount namespace of its own."""
    found: Systemd = request.getfixturevalue("systemd")
    return found


@pytest.mark.time_limit(5 * SLOW)
def test_the_quota_unit_tells_whose_quota_it_is_and_comes_again(units: Systemd, drive: Disk) -> None:
    alice = person("alice")

    def quota() -> dict[str, Any]:
        """What the source says of it, by way of the broker; empty before everything has started."""
        said = units.say(sys.executable, "-I", "-m", "upcall", "status", "--json")
        try:
            found: dict[str, Any] = json.loads(said)
        except ValueError:
            return {}
        everybody = {one["uid"] for one in found["daemons"]} >= {pwd.getpwnam(machine.USER).pw_uid, alice.uid}
        return dict(found["quota"]) if everybody else {}

    def main_pid() -> str:
        return units.say("systemctl", "show", "--property=MainPID", "--value", "upcall-quota.service")

    try:
        wait_until(lambda: units.is_active(*SERVICES), "the services", SLOW)
        wait_until(lambda: quota().get("filesystems") == [str(drive.point)], "the source sees the disk", 2 * SLOW)
        assert quota()["listening"]
        assert quota()["hardening"]["capabilities"] == "SYS_ADMIN"
        drive.limit("u", alice.uid, 0, MB)
        assert fill(alice, drive.point / "alice", 2 * MB) in NO_ROOM
        wait_until(lambda: quota()["delivered"] >= 1, "told", SLOW)
        assert (quota()["watched"], quota()["lost"]) == (1, 0)
        # Killed, it comes again, and has read what it had written down.
        before = main_pid()
        wait_until(lambda: Path("/var/lib/upcall/quota.json").exists(), "the state", SLOW)
        units.say("systemctl", "kill", "--signal=KILL", "upcall-quota.service")
        wait_until(lambda: main_pid() not in (before, "0"), "another source", SLOW)
        wait_until(lambda: quota().get("readings", 0) > 0, "it has read all quotas", SLOW)
        assert (quota()["watched"], quota()["delivered"]) == (1, 0)
        log = Path("/var/log/units").read_text()
        assert "quota-read-failed" not in log and "quota-receive-failed" not in log
        assert "quota-state" not in log
    except TimeoutError:
        pytest.fail(Path("/var/log/units").read_text() + Path("/var/log/systemd").read_text())

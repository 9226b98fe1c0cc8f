"""What `upcall doctor` says of keys at login and of locking: a real daemon, with and without a logind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.played_logind import MISSING, Logind, system_bus
from tests.sessions_of_keys import run_within
from tests.test_doctor_broken import found, home, mend, problems  # noqa: F401 - a fixture
from upcall.kernel import keyring
from upcall.observe.doctor.findings import NOTE, OK
from upcall.observe.doctor.system import Scene
from upcall.process.control import DaemonControl
from upcall.process.settings import dumps
from upcall.protocols.ecryptfs.settings import FailedKey, LockSettings, LoginKeys
from upcall.testing.processes import ONLY_AGENT, RunningBroker, Started, until


def start(folder: Path, bus: str) -> Started:
    """A daemon of a user: root's own hears of fewer things."""
    locking = LockSettings(causes=("suspend", "logout"))
    keys = LoginKeys(folder, failed=(FailedKey("x.toml", "mode 0644 lets others in"),))
    arguments = ["-m", "upcall.daemon", dumps(ONLY_AGENT._replace(folder=folder, locking=locking, keys=keys))]
    return Started(arguments, folder.parent / "daemon.log", {"DBUS_SYSTEM_BUS_ADDRESS": bus})


def test_a_missing_logind_and_a_key_not_added_at_login_are_reported(broker: RunningBroker, folder: Path) -> None:
    with start(folder, "unix:path=/nowhere") as daemon:
        broker.registered(daemon.pid)
        daemon.logged("logind-unavailable")
        (finding,) = found("locking", Scene(folder))
        assert finding.state == NOTE
        assert "suspend, logout lock no keys" in finding.what and "/nowhere" in finding.what
        (finding,) = problems("login-keys", Scene(folder))
        assert f"{folder}/x.toml: mode 0644 lets others in" in finding.what


@pytest.mark.skipif(bool(MISSING), reason=MISSING or "-")
def test_with_logind_locking_is_well_and_locked_keys_are_reported(broker: RunningBroker, folder: Path) -> None:
    with system_bus(folder.parent) as bus:
        logind = Logind(bus, os.getuid())
        with start(folder, bus.address) as daemon:
            broker.registered(daemon.pid)
            daemon.logged("logind-listening")
            (finding,) = found("locking", Scene(folder))
            assert (finding.state, finding.what) == (OK, "logind is connected: suspend, logout lock the keys")
            with DaemonControl() as control:
                control.lock(None)
                locked = found("locking", Scene(folder))[1]
                assert "all keys are locked: command" in locked.what
                mend(locked)
                until(lambda: len(found("locking", Scene(folder))) == 1, "unlocked")
        logind.close()


@pytest.fixture
def work(home: Path) -> Iterator[str]:  # noqa: F811
    made = run_within("linked", ["-m", "upcall", "key", "generate", "work", "--no-passphrase", "--no-add", "--auto"])
    yield made.split()[1]
    keyring.ensure_user_keyring_linked()
    if (serial := keyring.find(made.split()[1])) is not None:
        keyring.unlink(serial)


def test_an_auto_key_missing_from_the_user_keyring_is_reported_and_added(work: str, folder: Path) -> None:
    (finding,) = [one for one in problems("auth-tokens", Scene(folder)) if "key work" in one.what]
    assert "although it is marked auto" in finding.what
    mend(finding)
    assert keyring.find(work) is not None
    assert not [one for one in problems("auth-tokens", Scene(folder)) if "key work" in one.what]

"""A daemon whose keys lock with the machine and its screen: a real broker, a real bus, a played logind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.played_logind import MISSING, Logind, SystemBus, system_bus
from upcall import config
from upcall.core.errors import Refused
from upcall.daemon import plugin_discovery as finding
from upcall.daemon.plugins import Discovered, Module, Plugins
from upcall.process.control import DaemonControl
from upcall.process.settings import dumps
from upcall.protocols.ecryptfs.settings import LockSettings
from upcall.testing.gate import Gate
from upcall.testing.keys import FolderKeyring
from upcall.testing.processes import ONLY_AGENT, RunningBroker, RunningDaemon, until
from upcall.testing.toy import make_toy_key

needs_a_bus = pytest.mark.skipif(bool(MISSING), reason=MISSING or "-")
KEY = b"0123456789abcdef"
PASSPHRASE = b"open sesame"
Start = Callable[..., RunningDaemon]
pytestmark = pytest.mark.usefixtures("runtime_folder")


@pytest.fixture
def start(folder: Path, broker: RunningBroker) -> Iterator[Start]:
    with contextlib.ExitStack() as stack:

        def started(
            locking: LockSettings = LockSettings(),  # noqa: B008
            bus: str = "unix:path=/nowhere",
            isolated: bool = False,
            found: Path | None = None,
        ) -> RunningDaemon:
            spec = {"toy": "upcall.testing.toy:TOY", "gated": "gated:GATED"}
            running = RunningDaemon(
                folder,
                folder.parent / "keys",
                {} if isolated else spec,
                [Path(__file__).parent],
                control=True,
                isolated=spec if isolated else {},
                settings=ONLY_AGENT._replace(locking=locking),
                environment={"DBUS_SYSTEM_BUS_ADDRESS": bus},
                found=found,
            )
            stack.enter_context(running)
            broker.registered(running.pid)
            return running

        yield started


@pytest.fixture
def bus(folder: Path) -> Iterator[SystemBus]:
    with system_bus(folder.parent) as started:
        yield started


@pytest.fixture
def logind(bus: SystemBus) -> Iterator[Logind]:
    played = Logind(bus, os.getuid())
    yield played
    played.close()


@pytest.fixture
def protected(folder: Path, keyring: FolderKeyring) -> str:
    """A key whose passphrase is asked for."""
    name, blob = make_toy_key(folder.parent / "protected.key", PASSPHRASE)
    return keyring.add(name, "toy", blob)


def asked(broker: RunningBroker, signature: str) -> str:
    with broker.client() as client:
        try:
            client.wrap(signature, KEY)
        except Refused as refused:
            return refused.reason
    return "answered"


def status() -> dict[str, Any]:
    with DaemonControl() as control:
        return control.status()


def listening() -> bool:
    return bool(status()["locking"]["listening"])


EVERY = LockSettings(causes=("suspend", "screen-lock", "logout"))
SUSPEND = LockSettings(causes=("suspend",))


@needs_a_bus
@pytest.mark.parametrize("isolated", [False, True])
def test_each_cause_locks_every_key_and_its_end_opens_those_without_passphrase(
    broker: RunningBroker, start: Start, bus: SystemBus, logind: Logind, signature: str, protected: str, isolated: bool
) -> None:
    path = logind.session("c1", tell=False)
    daemon = start(EVERY, bus=bus.address, isolated=isolated)
    until(listening, "logind is heard")
    begin: dict[str, Callable[[], object]] = {
        "suspend": lambda: logind.sleep(True),
        "screen-lock": lambda: logind.lock(path),
        "logout": lambda: logind.ends(path),
    }
    end: dict[str, Callable[[], object]] = {
        "suspend": lambda: logind.sleep(False),
        "screen-lock": lambda: logind.lock(path, "Unlock"),
        "logout": lambda: logind.session("c2"),
    }
    for cause in ("suspend", "screen-lock", "logout"):
        with DaemonControl() as control:
            control.unlock(protected, bytearray(PASSPHRASE))
        assert asked(broker, protected) == asked(broker, signature) == "answered"
        begin[cause]()
        until(lambda cause=cause: status()["held"] == [cause], f"locked by {cause}")  # type: ignore[misc]
        assert asked(broker, protected) == asked(broker, signature) == "locked"
        assert not [one for one in status()["keys"] if one.get("open")]
        assert not found_in_memory(daemon.pid, PASSPHRASE)
        end[cause]()
        until(lambda: status()["held"] == [], f"{cause} is over")
        assert asked(broker, signature) == "answered"  # nobody is needed for it
        assert asked(broker, protected) == "locked"  # somebody is, and nobody is there
    daemon.logged("keys-locked why=suspend forgotten=2")
    daemon.logged("keys-unlocked why=logout")
    assert PASSPHRASE.decode() not in daemon.log


def found_in_memory(pid: int, word: bytes) -> bool:
    """False without root, which alone reads the memory of a process that is not dumpable."""
    if os.geteuid() != 0:
        return False
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            begin, end = (int(one, 16) for one in line.split()[0].split("-"))
            if " rw" in line and "[v" not in line:
                memory.seek(begin)
                with contextlib.suppress(OSError):
                    if word in memory.read(end - begin):
                        return True
    return False


@needs_a_bus
def test_the_machine_sleeps_only_when_the_keys_are_closed(
    broker: RunningBroker, start: Start, bus: SystemBus, logind: Logind, signature: str
) -> None:
    start(SUSPEND, bus=bus.address)
    until(listening, "logind is heard")
    assert asked(broker, signature) == "answered"
    assert logind.waits_before_sleep()
    logind.sleep(True)
    until(lambda: not logind.waits_before_sleep(), "it may sleep")
    assert asked(broker, signature) == "locked"


@needs_a_bus
def test_unlock_opens_keys_behind_a_locked_screen_until_it_locks_again(
    broker: RunningBroker, start: Start, bus: SystemBus, logind: Logind, signature: str, protected: str
) -> None:
    """Over ssh, for example."""
    path = logind.session("c1", tell=False)
    start(EVERY, bus=bus.address)
    until(listening, "logind is heard")
    logind.lock(path)
    until(lambda: status()["held"] == ["screen-lock"], "locked")
    with DaemonControl() as control:
        control.unlock(protected, bytearray(PASSPHRASE))
        assert asked(broker, protected) == "answered"
        assert asked(broker, signature) == "locked"
        control.unlock_all()
        assert asked(broker, signature) == "answered"
    logind.lock(path, "Unlock")
    logind.lock(path)
    until(lambda: status()["held"] == ["screen-lock"], "locked anew")
    assert asked(broker, protected) == "locked"


@needs_a_bus
def test_a_lock_by_command_outlasts_a_screen_lock(
    broker: RunningBroker, start: Start, bus: SystemBus, logind: Logind, signature: str
) -> None:
    path = logind.session("c1", tell=False)
    start(EVERY, bus=bus.address)
    until(listening, "logind is heard")
    with DaemonControl() as control:
        control.lock(None)
    logind.lock(path)
    until(lambda: "screen-lock" in status()["held"], "locked")
    logind.lock(path, "Unlock")
    until(lambda: status()["held"] == ["command"], "one lock is left")
    assert asked(broker, signature) == "locked"
    with DaemonControl() as control:
        control.unlock_all()
    assert asked(broker, signature) == "answered"


@needs_a_bus
def test_a_killed_listener_is_replaced_and_a_bus_that_returns_is_heard_again(
    broker: RunningBroker, start: Start, bus: SystemBus, logind: Logind, signature: str
) -> None:
    path = logind.session("c1", tell=False)
    daemon = start(EVERY, bus=bus.address)
    until(listening, "logind is heard")
    logind.lock(path)
    until(lambda: status()["held"] == ["screen-lock"], "locked")
    (child,) = children(daemon.pid)
    os.kill(child, signal.SIGKILL)
    daemon.logged("logind-unavailable why='the process that listens has ended with status -9'")
    assert asked(broker, signature) == "locked"  # nobody knows better
    until(listening, "a new one")  # which sees no hint: not every locker gives one
    assert status()["held"] == ["screen-lock"]
    logind.lock(path, "Unlock")
    until(lambda: status()["held"] == [], "unlocked")
    bus.stop()
    logind.close()
    until(lambda: not listening(), "nobody is heard")
    assert asked(broker, signature) == "answered"
    bus.start()
    again = Logind(bus, os.getuid())
    until(listening, "logind is heard again", 20)
    again.sleep(True)
    until(lambda: asked(broker, signature) == "locked", "locked")
    again.close()


@needs_a_bus
def test_the_listener_dies_with_the_daemon(start: Start, bus: SystemBus, logind: Logind) -> None:
    for number in (signal.SIGKILL, signal.SIGTERM):
        daemon = start(EVERY, bus=bus.address)
        until(listening, "logind is heard")
        (child,) = children(daemon.pid)
        daemon.signal(number)
        daemon.wait()
        until(lambda child=child: not Path(f"/proc/{child}").exists(), "it has ended")  # type: ignore[misc]


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(one) for one in (task / "children").read_text().split()]
    return found


@needs_a_bus
def test_a_key_that_opens_during_a_lock_is_refused_as_locked(
    broker: RunningBroker, start: Start, bus: SystemBus, logind: Logind, keyring: FolderKeyring, gate: Gate
) -> None:
    """The lock wins, even if it is over by the time that the key is open."""
    name, blob = make_toy_key(gate.path.with_name("gated.key"))
    keyring.add(name, "gated", os.fsencode(gate.path) + b"\0" + blob)
    start(SUSPEND, bus=bus.address)
    until(listening, "logind is heard")
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(asked, broker, name)
        visitor = gate.arrived()
        logind.sleep(True)
        until(lambda: status()["held"] == ["suspend"], "locked, and not kept waiting by it")
        logind.sleep(False)
        until(lambda: status()["held"] == [], "and unlocked")
        visitor.release()
        assert answer.result() == "locked"
    gate.close()
    assert asked(broker, name) == "answered"


def test_without_a_bus_one_log_line_and_the_status_say_so(start: Start) -> None:
    daemon = start(EVERY)
    daemon.logged(
        "logind-unavailable why='no system bus: /nowhere: No such file or directory' missed=suspend,screen-lock,"
    )
    until(lambda: status()["locking"]["why"], "the status says it, too")
    assert daemon.log.count("logind-unavailable") == 1


def test_keys_are_locked_after_a_time_without_use(
    broker: RunningBroker, start: Start, signature: str, protected: str
) -> None:
    daemon = start(LockSettings(after=1.5))
    with DaemonControl() as control:
        control.unlock(protected, bytearray(PASSPHRASE))
        assert asked(broker, protected) == asked(broker, signature) == "answered"
        daemon.logged(f"key-locked key={protected} why=unused")
        daemon.logged(f"key-locked key={signature} why=unused")
        assert control.status()["keys"] == []
        assert asked(broker, protected) == "locked"  # nobody is there to be asked
        assert asked(broker, signature) == "answered"
        assert not found_in_memory(daemon.pid, PASSPHRASE)


def test_use_of_a_key_postpones_its_lock(broker: RunningBroker, start: Start, signature: str) -> None:
    daemon = start(LockSettings(after=2.0))
    never = threading.Event()
    for _ in range(8):
        assert asked(broker, signature) == "answered"
        never.wait(0.4)
    assert "why=unused" not in daemon.log
    daemon.logged(f"key-locked key={signature} why=unused")


@needs_a_bus
def test_a_reload_applies_a_changed_lock_on(
    broker: RunningBroker, start: Start, bus: SystemBus, logind: Logind, folder: Path, signature: str
) -> None:
    found, plugins = folder.parent / "found.json", Plugins((Module("toy", "upcall.testing.toy:TOY"),))
    found.write_text(dumps(Discovered(plugins)))
    path = logind.session("c1", tell=False)
    daemon = start(EVERY, bus=bus.address, found=found)
    until(listening, "logind is heard")
    logind.lock(path)
    until(lambda: status()["held"] == ["screen-lock"], "locked")
    daemon.signal(signal.SIGHUP)
    until(lambda: asked(broker, signature) == "answered", "nothing locks any more")
    until(lambda: not listening(), "nobody is to be heard")
    assert status()["locking"] == {"lock_after": 0, "lock_on": [], "listening": False, "why": ""}
    assert children(daemon.pid) == []
    found.write_text(dumps(Discovered(plugins, SUSPEND)))
    daemon.signal(signal.SIGHUP)
    until(listening, "logind is heard")


def test_the_users_lock_settings_override_the_systems_and_bad_ones_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system, user = tmp_path / "system.toml", tmp_path / "user" / "upcall" / "config.toml"
    user.parent.mkdir(parents=True)
    monkeypatch.setattr(config, "SYSTEM", system)
    monkeypatch.setattr(config, "VENDOR", tmp_path / "vendor.toml")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(finding, "is_machines", lambda: False)
    assert finding.locks() == EVERY
    system.write_text('[keys]\nlock-after = 60\nlock-on = ["logout", "suspend"]\n')
    assert finding.locks() == LockSettings(60.0, ("logout", "suspend"))
    user.write_text("[keys]\nlock-on = []\n")
    assert finding.locks() == LockSettings(60.0)
    user.write_text('[keys]\nlock-on = ["suspend", "sleep"]\n')
    with pytest.raises(config.ConfigError, match=r"2: keys\.lock-on: 'sleep'; must be a list of some of suspend"):
        finding.locks()
    user.write_text("")
    monkeypatch.setattr(finding, "is_machines", lambda: True)
    assert finding.locks() == LockSettings(60.0, ("suspend",))


def test_a_daemon_without_lock_settings_has_neither_thread_nor_listener(start: Start) -> None:
    daemon = start()
    assert "locking" not in [path.read_text().strip() for path in Path(f"/proc/{daemon.pid}/task").glob("*/comm")]
    assert children(daemon.pid) == []


def test_the_daemon_starts_without_importing_jeepney_or_subprocess() -> None:
    program = (
        "import sys; from upcall.daemon import __main__; "
        "print([name for name in sys.modules if name.split('.')[0] in ('jeepney', 'tomllib', 'subprocess')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

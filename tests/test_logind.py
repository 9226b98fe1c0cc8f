"""The process that listens to logind, on a real bus with a played logind."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest
from jeepney import DBusAddress, HeaderFields, new_signal

from tests.played_logind import MANAGER, MISSING, PATH, SESSION, Logind, SystemBus, system_bus
from upcall.process.logind import CAUSES, MAX_WORD, NO_LOGIND, signals
from upcall.testing.processes import PATIENCE, until

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING or "-")
UID = 4711
QUIET = 0.3  # seconds in which what must not be said would have been said


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[SystemBus]:
    with system_bus(tmp_path) as started:
        yield started


@pytest.fixture
def logind(bus: SystemBus) -> Iterator[Logind]:
    played = Logind(bus, UID)
    yield played
    played.close()


class Listener:
    """The process, and what the daemon would hear of it."""

    def __init__(self, address: str, causes: Sequence[str] = CAUSES) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "upcall.process.logind", str(UID), *causes],
            stdin=theirs.fileno(),
            env={**os.environ, "DBUS_SYSTEM_BUS_ADDRESS": address},
        )
        theirs.close()

    def says(self, *words: str) -> None:
        """Exactly these, one after the other; each is done at once."""
        for word in words:
            assert self.hear() == word
            self.done(word)

    def hear(self, timeout: float = PATIENCE) -> str:
        if not select.select([self.socket], [], [], timeout)[0]:
            return "(nothing)"
        return self.socket.recv(MAX_WORD).decode()

    def done(self, word: str) -> None:
        self.socket.send(word.encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self.process.kill()
        self.process.wait()


def test_sleep_waits_until_the_daemon_has_locked(bus: SystemBus, logind: Logind) -> None:
    with Listener(bus.address, ["suspend"]) as listener:
        listener.says("off suspend")
        assert logind.waits_before_sleep()
        logind.sleep(True)
        assert listener.hear() == "on suspend"
        assert listener.hear(QUIET) == "(nothing)"
        assert logind.waits_before_sleep()  # the daemon is still at it
        listener.done("something else")
        assert logind.waits_before_sleep()
        listener.done("on suspend")
        until(lambda: not logind.waits_before_sleep(), "the machine may sleep")
        logind.sleep(False)
        listener.says("off suspend")
        until(logind.waits_before_sleep, "it would wait the next time, too")


def test_a_daemon_that_hangs_does_not_keep_the_machine_awake(bus: SystemBus, logind: Logind) -> None:
    with Listener(bus.address, ["suspend"]) as listener:
        listener.says("off suspend")
        logind.sleep(True)
        assert listener.hear() == "on suspend"  # and never says that it is done
        until(lambda: not logind.waits_before_sleep(), "the machine may sleep")


def test_a_daemon_has_less_time_to_lock_than_logind_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the listener asks of select(2), by a clock that stands still; logind waits 5 s (InhibitDelayMaxSec=)."""
    waits: list[float] = []

    def nothing_ready(*arguments: Any) -> tuple[list[int], list[int], list[int]]:
        waits.append(arguments[3])
        return [], [], []

    monkeypatch.setattr(signals, "select", SimpleNamespace(select=nothing_ready))
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: 100.0))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        watch = signals.Watch.__new__(signals.Watch)  # without a bus
        watch._daemon, watch._said = ours, {}
        watch._say("suspend", True)
        assert theirs.recv(MAX_WORD) == b"on suspend"
    assert waits == [4.0]


def test_a_refused_sleep_inhibitor_is_noted_and_suspend_is_still_reported(bus: SystemBus, logind: Logind) -> None:
    logind.refuse_inhibit = True
    with Listener(bus.address, ["suspend"]) as listener:
        assert "does not wait before it sleeps: org.freedesktop.DBus.Error.AccessDenied" in listener.hear()
        listener.says("off suspend")
        logind.sleep(True)
        listener.says("on suspend")


def test_the_screen_counts_as_locked_while_any_session_of_the_user_is(bus: SystemBus, logind: Logind) -> None:
    one, two = logind.session("c1", tell=False), logind.session("c2", tell=False)
    other = logind.session("c3", tell=False, uid=UID + 1)
    greeter = logind.session("c4", kind="greeter", tell=False)
    with Listener(bus.address, ["screen-lock"]) as listener:
        listener.says("off screen-lock")
        logind.lock(one)
        listener.says("on screen-lock")
        logind.hint(one, True)  # as a desktop's locker says a moment later
        logind.lock(two)
        logind.hint(one, False)
        logind.lock(other)
        logind.lock(greeter)
        assert listener.hear(QUIET) == "(nothing)"  # the other is locked still
        logind.lock(two, "Unlock")
        listener.says("off screen-lock")
        logind.hint(two, True)
        listener.says("on screen-lock")
        logind.ends(two)
        listener.says("off screen-lock")


def test_locks_from_before_the_start_are_reported_at_the_start(bus: SystemBus, logind: Logind) -> None:
    path = logind.session("c1", tell=False)
    logind.hint(path, True)
    logind.asleep = True
    with Listener(bus.address) as listener:
        listener.says("on suspend", "on screen-lock", "off logout")


def test_a_replacement_listener_keeps_a_held_lock_until_an_unlock_is_seen(bus: SystemBus, logind: Logind) -> None:
    path = logind.session("c1", tell=False)
    with Listener(bus.address, ["screen-lock!"]) as listener:
        listener.says("on screen-lock")
        logind.session("c2")
        logind.hint(path, False)
        listener.says("off screen-lock")


def test_logout_is_reported_when_the_last_login_session_ends(bus: SystemBus, logind: Logind) -> None:
    with Listener(bus.address, ["logout"]) as listener:
        assert listener.hear(QUIET + 1) == "(nothing)"  # nobody has logged in, and so nobody out
        one = logind.session("1")
        listener.says("off logout")
        two = logind.session("2")
        logind.ends(one)
        assert listener.hear(QUIET) == "(nothing)"
        logind.session("m", kind="manager")
        logind.session("cron", kind="background")
        logind.ends(two)
        listener.says("on logout")
        logind.session("3")
        listener.says("off logout")


def test_a_session_that_stays_closing_counts_as_logged_out(bus: SystemBus, logind: Logind) -> None:
    """logind says nothing then: the session is `closing` for as long as there is a process in it."""
    leader = subprocess.Popen(["sleep", "60"])
    path = logind.session("1", leader=leader.pid, tell=False)
    with Listener(bus.address, ["logout"]) as listener:
        listener.says("off logout")
        logind.sessions[path]["State"] = ("s", "closing")
        leader.kill()
        leader.wait()
        listener.says("on logout")


def test_signals_that_logind_did_not_send_are_ignored_with_a_note(bus: SystemBus, logind: Logind) -> None:
    path = logind.session("c1", tell=False)
    forger = bus.connect()
    with Listener(bus.address) as listener:
        listener.says("off suspend", "off screen-lock", "off logout")
        us = next(name for name in names(forger) if name not in (forger.unique_name, logind._connection.unique_name))
        for target in (None, us):  # to whoever listens, and to the process itself
            for signal_ in (
                new_signal(DBusAddress(PATH, interface=MANAGER), "PrepareForSleep", "b", (True,)),
                new_signal(DBusAddress(path, interface=SESSION), "Lock"),
                new_signal(
                    DBusAddress("/org/freedesktop/DBus", interface="org.freedesktop.DBus"),
                    "NameOwnerChanged",
                    "sss",
                    ("org.freedesktop.login1", logind._connection.unique_name, forger.unique_name),
                ),
            ):
                if target is not None:
                    signal_.header.fields[HeaderFields.destination] = target
                forger.send(signal_)
        assert listener.hear() == "note a signal of logind's that logind has not sent was ignored"
        assert listener.hear(QUIET) == "(nothing)"
        logind.lock(path)
        listener.says("on screen-lock")
    forger.close()


def names(connection: object) -> list[str]:
    listed: list[str] = connection.bus_proxy.ListNames()[0]  # type: ignore[attr-defined]
    return [name for name in listed if name.startswith(":")]


def test_a_restarted_logind_is_asked_to_delay_sleep_again(bus: SystemBus, logind: Logind) -> None:
    with Listener(bus.address, ["suspend"]) as listener:
        listener.says("off suspend")
        logind.close()
        until(lambda: "org.freedesktop.login1" not in bus.connect().bus_proxy.ListNames()[0], "it has gone")
        again = Logind(bus, UID)
        until(again.waits_before_sleep, "the new one is asked to wait")
        again.sleep(True)
        listener.says("on suspend")
        until(lambda: not again.waits_before_sleep(), "and may go on")
        again.close()


def test_a_lost_bus_ends_the_listener_with_a_temporary_failure(bus: SystemBus, logind: Logind) -> None:
    with Listener(bus.address, ["suspend"]) as listener:
        listener.says("off suspend")
        bus.stop()
        assert listener.hear().startswith("note Connection")
        assert listener.hear() == ""
        assert listener.process.wait(PATIENCE) == os.EX_TEMPFAIL


def test_without_a_bus_or_logind_the_listener_notes_why_and_ends(bus: SystemBus, tmp_path: Path) -> None:
    for address, why in (
        (f"unix:path={tmp_path}/nowhere", "no system bus: "),
        ("tcp:host=localhost", "no system bus: "),
        (bus.address, "no logind on the system bus"),
    ):
        with Listener(address) as listener:
            assert listener.hear().startswith(f"note {why}")
            assert listener.process.wait(PATIENCE) == NO_LOGIND


def test_without_jeepney_the_listener_notes_it_and_ends(
    bus: SystemBus, logind: Logind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jeepney.py").write_text("raise ImportError('there is none')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Listener(bus.address) as listener:
        assert listener.hear() == "note the Python package jeepney cannot be used: there is none"
        assert listener.process.wait(PATIENCE) == NO_LOGIND


def test_a_silent_bus_ends_the_listener_with_a_note(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(os.fspath(tmp_path / "bus"))
        silent.listen(1)
        with Listener(f"unix:path={tmp_path}/bus") as listener:
            assert "note " in listener.hear(PATIENCE + 10)
            assert listener.process.wait(PATIENCE) != 0


def test_the_listener_ends_with_the_daemon(bus: SystemBus, logind: Logind) -> None:
    with Listener(bus.address, ["suspend"]) as listener:
        listener.says("off suspend")
        listener.socket.close()
        assert listener.process.wait(PATIENCE) == 0
    program = (
        "import subprocess, sys;"
        "child = subprocess.Popen([sys.executable, '-m', 'upcall.process.logind', '1', 'suspend']);"
        "print(child.pid, flush=True); sys.stdin.read()"
    )
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {**os.environ, "DBUS_SYSTEM_BUS_ADDRESS": bus.address}
    parent = subprocess.Popen([sys.executable, "-c", program], stdin=theirs.fileno(), stdout=-1, env=environment)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert ours.recv(MAX_WORD) == b"off suspend"
    watch = os.pidfd_open(pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert select.select([watch], [], [], PATIENCE)[0]
    os.close(watch)
    ours.close()
    theirs.close()

"""Daemons that are not there, die, or are asked for too much: the caller has its error at once."""

from __future__ import annotations

import errno
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from tests.kernel.hostile import HostileModule
from tests.kernel.scene import (
    CONTENT,
    Gate,
    House,
    Outcome,
    attempt,
    begin,
    creating,
    key_service,
    keys,
    nothing_given_up,
    opening,
    outcome_counts,
    pending,
    results,
    vault,
    waiting,
)
from upcall.keymodule import KeyHandle
from upcall.protocols.ecryptfs.key_handler import KeyHandler
from upcall.protocols.ecryptfs.protocol import ECRYPTFS
from upcall.testing.lab.stage import Person, Task, wait_until

KEY = keys()["rsa2048"]
BOBS = keys()["captured"]


def blocking(gate: Gate) -> Callable[[], KeyHandler]:
    """A daemon whose module unwraps once the gate is open."""

    def unwrap(handle: KeyHandle, wrapped: bytes) -> object:
        gate.wait()
        return handle.unwrap(wrapped)

    return lambda: key_service(lambda: HostileModule(unwrap=unwrap))


def _refused_at_once(tasks: list[Task[Outcome]]) -> None:
    with nothing_given_up():
        assert [outcome.errno for outcome in results(tasks)] == [errno.EIO] * len(tasks)


def _served_again(house: House, who: Person, path: Path) -> None:
    """Without a daemon: refused at once. With a new one: as if nothing had been."""
    with nothing_given_up():
        assert attempt(who, creating(path.with_name("too-early"))).errno == errno.ENOTCONN
        assert attempt(who, opening(path)).errno == errno.EIO
    house.daemon(who)
    assert attempt(who, opening(path)).value == CONTENT
    assert attempt(who, creating(path.with_name("new"))).errno == 0


def test_without_a_daemon_files_are_refused_at_once(house: House, alice: Person) -> None:
    daemon = house.daemon(alice)
    with vault(alice, KEY.signature) as files:
        path = files.cold(1)[0]
        daemon.end()
        wait_until(lambda: "device-closed" in house.log(), "the device to be closed")
        _served_again(house, alice, path)


def test_a_daemon_killed_with_requests_taken_has_them_refused_at_once(house: House, alice: Person) -> None:
    house.daemon(alice)
    with vault(alice, KEY.signature) as files:
        paths = files.cold(4)
        daemon = house.daemon(alice, blocking(house.gate()))
        tasks = waiting(alice, paths)
        daemon.send_signal(signal.SIGKILL)
        _refused_at_once(tasks)
        assert outcome_counts()["daemon-gone"] == 4
        _served_again(house, alice, paths[0])


def test_a_daemon_killed_with_requests_queued_has_them_refused_at_once(house: House, alice: Person) -> None:
    """Stopped first, so that nobody takes them out of its socket."""
    daemon = house.daemon(alice)
    with vault(alice, KEY.signature) as files:
        paths = files.cold(4)
        daemon.send_signal(signal.SIGSTOP)
        tasks = waiting(alice, paths)
        daemon.send_signal(signal.SIGKILL)
        _refused_at_once(tasks)
        _served_again(house, alice, paths[0])


def test_a_newer_daemon_answers_what_the_older_had_taken(house: House, alice: Person) -> None:
    """A newer daemon takes over what the older one holds: nobody notices."""
    house.daemon(alice)
    with vault(alice, KEY.signature) as files:
        paths = files.cold(4)
        older = house.daemon(alice, blocking(house.gate()))
        tasks = waiting(alice, paths)
        house.daemon(alice)
        assert [outcome.value for outcome in results(tasks)] == [CONTENT] * 4
        wait_until(lambda: older.ended, "the older daemon")


def test_a_daemon_stopped_while_eight_processes_open_files_holds_up_nobody_else(
    house: House, alice: Person, bob: Person
) -> None:
    """The classic that breaks the kernel when the daemon itself has to read the device. Again and again."""
    daemon = house.daemon(alice)
    house.daemon(bob)
    with vault(alice, KEY.signature) as files, vault(bob, BOBS.signature) as others:
        for cycle in range(1, 4):
            paths = files.cold(8)
            bobs = others.cold(8)
            daemon.send_signal(signal.SIGSTOP)
            tasks = waiting(alice, paths)
            for path in bobs:
                assert attempt(bob, opening(path)).value == CONTENT
            assert [outcome.errno for outcome in results(tasks)] == [errno.EIO] * 8
            assert outcome_counts()["timed-out"] >= 8 * cycle
            daemon.send_signal(signal.SIGCONT)
            for path in paths:
                assert attempt(alice, opening(path)).value == CONTENT


def test_a_daemon_stopped_while_files_are_opened_in_turn_serves_again_afterwards(house: House, alice: Person) -> None:
    """Each of them takes a context that the one before has just left."""
    daemon = house.daemon(alice)
    with vault(alice, KEY.signature) as files:
        paths = files.cold(3)
        daemon.send_signal(signal.SIGSTOP)
        for path in paths:
            assert attempt(alice, opening(path)).errno == errno.EIO
        daemon.send_signal(signal.SIGCONT)
        for path in paths:
            assert attempt(alice, opening(path)).value == CONTENT


def test_short_stops_under_load_lose_nothing(house: House, alice: Person) -> None:
    """Short stops cost time, and nothing else. ecryptfsd ends after nine of them."""
    daemon = house.daemon(alice)
    with vault(alice, KEY.signature) as files:
        paths = files.cold(40)
        task = begin(alice, lambda: [path.read_bytes() for path in paths])
        cycles = 0
        while not task.ended:
            daemon.send_signal(signal.SIGSTOP)
            daemon.send_signal(signal.SIGCONT)
            cycles += 1
        assert task.result().value == [CONTENT] * 40
        assert cycles > 20


def test_requests_beyond_the_kernels_room_fail_and_the_others_are_served(house: House, alice: Person) -> None:
    """Forty at once, more than there are contexts: some fail at once, the others are served, nothing is stuck."""
    house.daemon(alice)
    gate = house.gate()
    with vault(alice, KEY.signature) as files:
        paths = files.cold(40)
        house.daemon(alice, blocking(gate))
        task = begin(alice, lambda: _open_all(paths, gate))
        outcomes: list[int] = task.result().value  # type: ignore[assignment]
        early = [code for code in outcomes if code]
        assert set(early) <= {errno.EIO}
        assert 40 - ECRYPTFS.contexts <= len(early) < 40
        for path in paths:
            assert attempt(alice, opening(path)).value == CONTENT


def _open_all(paths: list[Path], gate: Gate, *, ours: bool = True) -> list[int]:
    """The errno of each, all at the same time. Opens the gate itself, if `ours`, once eight were refused."""
    found: list[int] = []

    def work(path: Path) -> None:
        code = 0
        try:
            path.read_bytes()
        except OSError as error:
            code = error.errno or -1
        found.append(code)

    threads = [threading.Thread(target=work, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    if ours:
        wait_until(lambda: len(found) >= 8, "eight refusals")
        gate.open()
    for thread in threads:
        thread.join()
    return found


def test_one_person_cannot_take_all_of_the_kernels_room(house: House, alice: Person, bob: Person) -> None:
    """The kernel's contexts are everybody's. A module that hangs must not hold them all."""
    house.daemon(alice)
    house.daemon(bob)
    gate = house.gate()
    with vault(alice, KEY.signature) as files, vault(bob, BOBS.signature) as others:
        paths, bobs = files.cold(40), others.cold(4)
        house.daemon(alice, blocking(gate))
        tasks = [begin(alice, lambda: _open_all(paths, gate, ours=False))]
        wait_until(lambda: pending(alice) == ECRYPTFS.contexts - ECRYPTFS.reserve, "the crowd")
        for path in bobs:
            assert attempt(bob, opening(path)).value == CONTENT
        assert pending(alice) == ECRYPTFS.contexts - ECRYPTFS.reserve
        gate.open()
        results(tasks)

"""The broker itself ends, is killed, is stopped, or finds its places taken."""

from __future__ import annotations

import errno
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.scene import (
    CONTENT,
    House,
    attempt,
    creating,
    kernel_counts,
    keys,
    opening,
    results,
    vault,
    waiting,
)
from tests.kernel.test_daemon_faults import blocking
from upcall.daemon.process import Daemon, serve
from upcall.process.paths import SYSTEM_FOLDER, Place
from upcall.protocols.ecryptfs.device import Miscdev
from upcall.testing.lab.stage import Person, broker_status, serving, wait_until

KEY = keys()["rsa2048"]


@pytest.fixture
def empty_house() -> Iterator[House]:
    """Without a broker: the test decides when it comes."""
    made = House()
    try:
        yield made
    finally:
        made.close()


def test_the_broker_stays_in_memory(house: House) -> None:
    """A stall of more than 3 s with a request unread is a BUG as soon as there is a second one."""
    assert house.broker is not None
    status = Path(f"/proc/{house.broker.pid}/status").read_text()
    (locked,) = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmLck:")]
    assert locked > 1000
    (size,) = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")]
    assert size < 100_000  # locked as it is touched, and not all that is mapped


def test_a_killed_brokers_requests_end_and_a_new_one_serves_all_again(
    house: House, alice: Person, bob: Person
) -> None:
    """Who waited has its error when the kernel gives up; the daemons come back by themselves."""
    house.daemon(alice)
    bobs = house.daemon(bob)
    with vault(alice, KEY.signature) as files:
        paths = files.cold(5)
        alices = house.daemon(alice, blocking(house.gate()))
        tasks = waiting(alice, paths[:4])
        assert house.broker is not None
        house.broker.end(signal.SIGKILL)
        # A creation waits for its folder, which an opening of another name does not hold
        assert attempt(alice, creating(files.upper / "too-early")).errno == errno.ENOTCONN
        house.open()
        assert [outcome.errno for outcome in results(tasks)] == [errno.EIO] * 4
        for who, daemon in ((alice, alices), (bob, bobs)):
            wait_until(lambda who=who, daemon=daemon: serving(who.uid) == daemon.pid, who.name)  # type: ignore[misc]
        house.daemon(alice)
        for path in paths:
            assert attempt(alice, opening(path)).value == CONTENT


def test_a_broker_that_ends_refuses_what_is_pending(house: House, alice: Person) -> None:
    house.daemon(alice)
    with vault(alice, KEY.signature) as files:
        paths = files.cold(4)
        house.daemon(alice, blocking(house.gate()))
        tasks = waiting(alice, paths)
        assert house.broker is not None
        house.broker.send_signal(signal.SIGTERM)
        assert [outcome.errno for outcome in results(tasks)] == [errno.EIO] * 4
        assert attempt(alice, creating(files.upper / "too-early")).errno == errno.ENOTCONN
        house.broker.result()
        assert not (SYSTEM_FOLDER / "registration.sock").exists()


def test_a_broker_stopped_for_longer_than_the_kernel_waits_answers_no_stale_request(
    house: House, alice: Person, bob: Person
) -> None:
    """One request goes stale in the device: it is never answered, and the next ones work.

    One, because a second one before the stale one is read makes the kernel link a context twice, which is a BUG that
    only reading at once prevents.
    """
    house.daemon(alice)
    house.daemon(bob)
    with vault(alice, KEY.signature) as files:
        path = files.cold(1)[0]
        assert house.broker is not None
        house.broker.send_signal(signal.SIGSTOP)
        try:
            assert attempt(alice, opening(path)).errno == errno.EIO
        finally:
            house.broker.send_signal(signal.SIGCONT)
        wait_until(lambda: kernel_counts().get("stale") == 1, "the stale request to be read")
        assert attempt(alice, opening(path)).value == CONTENT
        assert kernel_counts().get("not taken", 0) == 0


def test_a_device_that_another_process_holds_is_opened_when_it_is_free(
    empty_house: House, alice: Person, root: Person
) -> None:
    """An ecryptfsd that runs still: logged, tried again, and served once it is gone."""
    house = empty_house
    gate = house.gate()

    def hold() -> None:
        Miscdev(alice.uid)
        held.open()
        gate.wait()

    held = house.gate()
    holder = house.run(root, hold)
    held.wait()
    house.open()

    daemon = house.run(alice, _serve)
    wait_until(lambda: "another daemon of this uid has it" in house.log(), "the broker to notice")
    status = broker_status()
    assert status is not None
    assert [(one["uid"], one["open"]) for one in status["devices"]] == [(alice.uid, False)]
    gate.open()
    holder.result()
    wait_until(lambda: serving(alice.uid) == daemon.pid, "the device")
    with vault(alice, KEY.signature) as files:
        assert attempt(alice, opening(files.cold(1)[0])).value == CONTENT


def _serve() -> None:
    from tests.kernel.scene import key_service

    serve(Daemon(Place(SYSTEM_FOLDER), [key_service()]))

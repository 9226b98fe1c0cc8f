"""Attacks on registration: noise on the sockets of a link, planted sockets, changed uids, reused pids, floods."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.attacks import raw
from tests.attacks.attacker import Attacker, Told, become
from tests.attacks.pushing import hellos, many_descriptors, unread
from tests.attacks.scene import ATTACKER, BEFORE, VICTIM, World, descriptors, serves, tries
from tests.attacks.spin import spin
from upcall.testing.processes import in_child, until

SYSTEM_PORTID = 0x75706300  # where brokers of the past were to be found
after = pytest.mark.skipif(BEFORE, reason="that broker has no such socket")


@after
@pytest.mark.parametrize("windows", [(), ("bind=0.02",)], ids=["as-it-is", "windows-open"])
def test_noise_on_every_portid_changes_no_registration(world: World, windows: tuple[str, ...]) -> None:
    """HELO, QUIT, requests and answers are sent to each socket from the moment in which it is bound."""
    sent = taken = 0
    noise = partial(spin, shouting=True)
    with Attacker(ATTACKER, noise, world.network.enter) as attacker, world.broker(*windows) as broker:
        for _ in range(tries(20)):
            with world.daemon() as daemon:
                world.wait_registered(daemon)
                serves(world, VICTIM)
                assert world.registered(ATTACKER) is None
                assert daemon.lives
                report = attacker.asked("report")
                assert report["got"] == []
                sent, taken = sent + report["sent"], taken + len(report["taken"])
                daemon.end(signal.SIGTERM)
                assert daemon.process.returncode == 0
                assert "unexpected-sender" not in daemon.log
        assert broker.lives
    print(f"noise during registration: {sent} messages, {taken} portids taken")
    assert sent > 0


def test_a_flood_of_helos_does_not_prevent_registration(world: World) -> None:
    """64 threads of each of four uids wait for a link at any time."""
    with world.broker() as broker, contextlib.ExitStack() as stack:
        for uid in range(ATTACKER, ATTACKER + 4):
            flooding = Attacker(uid, partial(hellos, folder=world.folder), world.network.enter)
            assert stack.enter_context(flooding).heard() == "pushing"
        began = time.monotonic()
        with world.daemon() as daemon:
            daemon.logged("daemon-registered broker=")
            print(f"registered {time.monotonic() - began:.1f} s after its start, in a flood of HELO")
            serves(world, VICTIM)
        assert broker.lives


def test_a_squatter_on_the_formerly_documented_portid_changes_nothing(world: World) -> None:
    def squat(told: Told) -> None:
        seat = raw.bind(SYSTEM_PORTID)
        told.say(seat is not None)
        told.word()

    with Attacker(ATTACKER, squat, world.network.enter) as attacker:
        assert attacker.heard()
        with world.broker(), world.daemon() as daemon:
            world.wait_registered(daemon)
            serves(world, VICTIM)


# --- who registers ---------------------------------------------------------------------------------------------------


@after
@pytest.mark.parametrize("real", [ATTACKER, VICTIM])
def test_a_process_with_differing_real_and_effective_uids_cannot_register(world: World, real: int) -> None:
    """As in a set-user-id program: AF_UNIX reports the effective uid, netlink the real one."""
    effective = VICTIM if real == ATTACKER else ATTACKER

    def attack(told: Told) -> None:
        os.setresgid(effective, effective, effective)
        os.setresuid(real, effective, effective)
        try:
            raw.register(world.folder)
        except OSError:
            told.say("refused")
        else:
            told.say("registered")
        told.word()

    with world.broker():
        with Attacker(0, attack, world.network.enter) as attacker:
            assert attacker.heard() == "refused"
            assert world.registered(VICTIM) is None
            assert world.registered(ATTACKER) is None
            assert world.status()["junk"].get("uid", 0) > 0
        with world.daemon() as daemon:
            world.wait_registered(daemon)


@after
@pytest.mark.parametrize("take", [raw.asked_for, raw.register], ids=["asked", "registered"])
def test_a_process_that_reuses_a_registered_pid_is_rejected(world: World, take: Callable[[Path], raw.Link]) -> None:
    """It has the link and the connection, the uid, and the very pid."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def first(told: Told) -> None:
        link = take(world.folder)
        assert link.far is not None
        assert link.connection is not None
        ends = (link.far, link.mine, link.connection)
        socket.send_fds(theirs, [b"x"], [end.fileno() for end in ends])
        told.word()

    with world.broker() as broker:
        with Attacker(ATTACKER, first, world.network.enter) as attacker:
            pid = attacker.pid
            _, fds, _, _ = socket.recv_fds(ours, 1, 3)
        far, mine, connection = (socket.socket(fileno=fd) for fd in fds)

        def second() -> bool:
            if os.getpid() != pid:
                return False
            become(ATTACKER)
            for message in (raw.control(raw.HELO), raw.response(0, 0, b"x"), raw.control(raw.HELO)):
                for end in (mine, connection):
                    with contextlib.suppress(OSError):
                        end.send(message, raw.DONTWAIT)
            return True

        def again() -> bool:
            Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
            return bool(in_child(second))

        until(again, f"a process with the pid {pid}", 30)
        serves_status(world)
        assert world.registered(ATTACKER) is None
        assert broker.lives
    for end in (far, mine, connection, ours, theirs):
        end.close()


def serves_status(world: World) -> None:
    """Several turns of the broker's loop later, so that it has read what was sent."""
    for _ in range(5):
        world.status()


@after
def test_a_daemon_sends_nothing_to_a_socket_planted_by_another_uid(world: World) -> None:
    """Neither where a broker's socket should be, nor through a symbolic link."""
    planted = world.above / "planted"
    planted.mkdir()
    os.chown(planted, ATTACKER, ATTACKER)

    def plant(told: Told) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(os.fspath(planted / "registration.sock"))
            (planted / "registration.sock").chmod(0o777)
            listener.listen(8)
            told.say("listening")
            for _ in range(3):
                connection, _ = listener.accept()
                with connection:
                    told.say(connection.recv(raw.MOST).hex())

    with Attacker(ATTACKER, plant) as attacker:
        assert attacker.heard() == "listening"
        world.folder.symlink_to(planted)
        with world.daemon() as daemon:
            for _ in range(3):
                assert attacker.heard() == ""
            daemon.logged(f"uid {ATTACKER} listens there")
    world.folder.unlink()


# --- floods ----------------------------------------------------------------------------------------------------------


@after
def test_links_that_are_never_taken_do_not_prevent_registration(world: World) -> None:
    """Their descriptors are in flight and count against the broker: 32 uids ask for 64 each."""
    with world.broker() as broker, contextlib.ExitStack() as stack:
        before = descriptors(broker.pid)
        for uid in range(64_400, 64_432):
            play = partial(unread, folder=world.folder, count=64)
            assert stack.enter_context(Attacker(uid, play, world.network.enter)).heard() > 0
        with world.daemon() as daemon:
            world.wait_registered(daemon)
            serves(world, VICTIM)
        stack.close()
        until(lambda: descriptors(broker.pid) <= before, f"{before} descriptors, as before", 30)
        assert broker.lives


def test_thousands_of_unexpected_descriptors_are_closed(world: World) -> None:
    """Of a FIFO, of connections, of a connection itself, with each kind of message, to both sockets that are open to
    all."""
    fifo = world.above / "fifo"
    os.mkfifo(fifo)
    fifo.chmod(0o666)
    with world.broker() as broker, world.daemon() as daemon:
        world.wait_registered(daemon)
        serves(world, VICTIM)
        before = descriptors(broker.pid)
        play = partial(many_descriptors, folder=world.folder, path=fifo)
        with Attacker(ATTACKER, play, world.network.enter) as attacker:
            sent, refused = attacker.heard(60)
            assert sent > 10_000 or (sent == 0 and refused > 10_000)
            serves(world, VICTIM)
            serves(world, 0)
        until(lambda: descriptors(broker.pid) <= before, f"{before} descriptors, as before", 30)
        assert broker.lives

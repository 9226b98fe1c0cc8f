"""Processes that lie on netlink: nobody answers for alice but her daemon."""

from __future__ import annotations

import array
import errno
import os
import socket
import struct
from pathlib import Path

from tests.kernel.scene import CONTENT, House, attempt, begin, daemon_status, keys, opening, pending, vault
from tests.kernel.test_daemon_faults import blocking
from upcall.core.messages import Answer
from upcall.kernel.local import connect
from upcall.kernel.netlink import NETLINK_USERSOCK
from upcall.kernel.ucred import SCM_CREDENTIALS
from upcall.process.paths import SYSTEM_FOLDER, Place
from upcall.protocols.ecryptfs.packets import Reply, pack_reply
from upcall.testing.lab.stage import Person, broker_status, serving, wait_until
from upcall.testing.played import PlayedDaemon
from upcall.wire.envelope import HELO, pack_control, pack_response

KEY = keys()["rsa2048"]
LIE = Answer(pack_reply(Reply(0x41, 0, bytes(19))))


def _register() -> PlayedDaemon:
    """As a daemon of this process's uid."""
    return PlayedDaemon(SYSTEM_FOLDER)


def _portids_of(pid: int) -> list[int]:
    """What anybody can see in /proc/net/netlink; whose they are, an attacker has to guess."""
    rows = Path("/proc/net/netlink").read_text().splitlines()[1:]
    inodes = {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()}
    fields = [row.split() for row in rows]
    return [int(row[2]) for row in fields if int(row[1]) == NETLINK_USERSOCK and f"socket:[{row[-1]}]" in inodes]


def _request_of(who: Person) -> tuple[int, int]:
    """(seq, index) of the one request that waits for this person's daemon: more than any attacker can know."""
    (one,) = daemon_status(who)["pending"]
    return one["seq"], one["index"]


def _junk() -> dict[str, int]:
    junk = (broker_status() or {})["junk"]
    assert isinstance(junk, dict)
    return junk


def test_another_uid_cannot_write_to_alices_link(house: House, alice: Person, bob: Person) -> None:
    """The kernel itself refuses: the broker's socket for alice is connected to alice's."""
    house.daemon(alice)
    gate = house.gate()
    with vault(alice, KEY.signature) as files:
        path = files.cold(1)[0]
        daemon = house.daemon(alice, blocking(gate))
        task = begin(alice, opening(path))
        wait_until(lambda: pending(alice) == 1, "the request")
        seq, index = _request_of(alice)
        assert house.broker is not None
        targets = _portids_of(house.broker.pid)
        assert len(targets) == 2
        assert set(targets) == set(_portids_of(daemon.pid))  # each has both

        def attack() -> list[int]:
            found = []
            for portid in targets:
                with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_USERSOCK) as liar:
                    try:
                        liar.sendto(pack_response(seq, index, LIE), (portid, 0))
                        found.append(0)
                    except OSError as error:
                        found.append(error.errno or -1)
            return found

        assert house.run(bob, attack).result() == [errno.ECONNREFUSED, errno.ECONNREFUSED]
        gate.open()
        assert task.result().value == CONTENT
        assert daemon_status(alice)["rejected"] == 0


def test_another_uids_daemon_cannot_answer_for_alices(house: House, alice: Person, bob: Person) -> None:
    """The kernel would take it: it looks at index and sequence only. The broker does not."""
    house.daemon(alice)
    gate = house.gate()
    with vault(alice, KEY.signature) as files:
        path = files.cold(1)[0]
        house.daemon(alice, blocking(gate))
        task = begin(alice, opening(path))
        wait_until(lambda: pending(alice) == 1, "the request")
        seq, index = _request_of(alice)
        done = house.gate()

        def attack() -> None:
            link = _register()
            link.send(pack_response(seq, index, LIE))
            link.send(pack_response(seq, index + 1000, LIE))
            done.wait()

        attacker = house.run(bob, attack)
        wait_until(lambda: daemon_status(bob).get("rejected") == 2, "both lies to be counted")
        status = broker_status()
        assert status is not None
        assert status["rejected"] == {"state": 1, "index": 1}
        gate.open()
        assert task.result().value == CONTENT
        done.open()
        attacker.result()


def test_a_helo_registers_its_sender_only(house: House, alice: Person, bob: Person) -> None:
    daemon = house.daemon(alice)
    done = house.gate()

    def attack() -> int:
        link = _register()
        # In the name of another process and user: the kernel lets only root say that.
        credentials = struct.pack("=iII", daemon.pid, alice.uid, alice.gid)
        try:
            ancillary = [(socket.SOL_SOCKET, SCM_CREDENTIALS, array.array("B", credentials))]
            link.socket.socket.sendmsg([pack_control(HELO)], ancillary)
        except OSError as error:
            return error.errno or -1
        finally:
            registered.open()
            done.wait()
            link.close()
        return 0

    registered = house.gate()
    attacker = house.run(bob, attack)
    registered.wait()
    assert serving(alice.uid) == daemon.pid
    assert serving(bob.uid) == attacker.pid
    done.open()
    assert attacker.result() == errno.EPERM


def test_a_child_of_the_daemon_is_not_the_daemon(house: House, alice: Person) -> None:
    """It has inherited the socket, and the kernel says whose hand it was."""
    done = house.gate()

    def attack() -> None:
        link = _register()
        if os.fork() == 0:
            link.send(pack_response(0, 0, LIE))
            os._exit(0)
        os.wait()
        done.wait()

    attacker = house.run(alice, attack)
    wait_until(lambda: _junk().get("pid") == 1, "the child to be counted")
    done.open()
    attacker.result()


def test_junk_on_the_registration_is_counted_and_holds_nobody_up(house: House, alice: Person, bob: Person) -> None:
    """Counted; whoever is registered is served meanwhile."""
    house.daemon(alice)
    messages = [b"", b"x", bytes(16), bytes(60000), pack_response(0, 0, LIE), pack_control(HELO) + b"x"]

    def attack() -> int:
        for message in messages[1:] * 50:
            with connect(Place(SYSTEM_FOLDER).registration_socket, frozenset({0})) as connection:
                connection.send(message)
                assert connection.recv(64) == b""
        return len(messages[1:] * 50)

    sent = house.run(bob, attack)
    with vault(alice, KEY.signature) as files:
        assert attempt(alice, opening(files.cold(1)[0])).value == CONTENT
    taken = sent.result()
    assert isinstance(taken, int)
    assert taken > 0
    wait_until(lambda: _junk().get("message", 0) == taken, "the junk to be counted")

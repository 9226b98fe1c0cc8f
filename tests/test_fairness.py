"""One person's many uids and processes against another user and root: connections, daemons, descriptors."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from upcall.kernel.local import connect, listen
from upcall.process.connection import LocalConnection
from upcall.protocols.ecryptfs.packets import Ask, pack_ask
from upcall.testing.broker import BrokerForTests
from upcall.testing.played import PlayedDaemon, PlayedRequester
from upcall.testing.processes import PATIENCE, RunningBroker, in_child, until
from upcall.wire.envelope import HELO, pack_control

PERSON, STRANGER, SUBUIDS = 64200, 64201, range(640_000, 640_016)
PLEASE = pack_ask(Ask(0x40, "0123456789abcdef", b"wrapped"))
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


@pytest.fixture
def subuid(tmp_path: Path) -> Path:
    path = tmp_path / "subuid"
    path.write_text(f"{PERSON}:{SUBUIDS[0]}:{len(SUBUIDS)}\n")
    path.chmod(0o644)
    return path


@contextlib.contextmanager
def running(folder: Path, subuid: Path, settings: BrokerForTests = BrokerForTests()) -> Iterator[RunningBroker]:  # noqa: B008
    with RunningBroker(folder, settings=settings._replace(subuid=subuid)) as broker:
        yield broker


def connected(folder: Path, uid: int, name: str = "broker.sock") -> socket.socket:
    """A connection of another uid: SO_PEERCRED tells of the effective one at connect(2)."""
    os.seteuid(uid)
    try:
        return connect(folder / name, frozenset({0}))
    finally:
        os.seteuid(0)


def ended(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def serves(broker: RunningBroker, uid: int) -> bool:
    found = in_child(broker.status, uid=uid)
    return bool(found["broker"]["pid"] == broker.pid)


def flood(broker: RunningBroker, each: int) -> list[socket.socket]:
    return [connected(broker.folder, uid) for uid in SUBUIDS for _ in range(each)]


@contextlib.contextmanager
def holding(broker: RunningBroker, each: int) -> Iterator[None]:
    """A process that holds on to what it has connected, as each of the subuids."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            held = flood(broker, each)
            os.write(writer, b"x")
            signal.pause()
            held.clear()
        finally:
            os._exit(1)
    os.close(writer)
    try:
        assert os.read(reader, 1) == b"x"
        yield
    finally:
        os.close(reader)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_sixteen_subuids_of_one_person_lock_out_neither_another_user_nor_root(folder: Path, subuid: Path) -> None:
    with running(folder, subuid) as broker:
        before = len(os.listdir(f"/proc/{broker.pid}/fd"))
        with holding(broker, 60):
            assert serves(broker, STRANGER)
            assert serves(broker, 0)
            until(lambda: len(os.listdir(f"/proc/{broker.pid}/fd")) <= before + 66, "one person's share")
            assert serves(broker, PERSON), "the person's own uid gets in, too"


def test_without_subuid_ranges_a_full_broker_evicts_the_uid_with_most_connections(
    folder: Path, tmp_path: Path
) -> None:
    with running(folder, tmp_path / "none", BrokerForTests(connections=64)) as broker:
        held = flood(broker, 4)
        assert serves(broker, STRANGER)
        assert serves(broker, 0)
        until(lambda: sum(ended(one) for one in held) >= 1, "one was evicted")
        assert sum(not ended(one) for one in held) >= 62
        for one in held:
            one.close()


def test_the_longest_idle_connection_is_evicted_and_none_with_a_request_pending(folder: Path, subuid: Path) -> None:
    with running(folder, subuid) as broker:

        def hold() -> list[bool]:
            with PlayedDaemon(broker.folder) as daemon:
                asking = PlayedRequester(broker.folder)
                asking.ask(PLEASE)
                daemon.request()
                idle = [connect(broker.folder / "broker.sock", frozenset({0})) for _ in range(63)]
                newcomer = PlayedRequester(broker.folder)
                newcomer.ask(b"", "broker.status")
                assert newcomer.reason() == "answered"
                until(lambda: ended(idle[0]), "the longest idle is evicted")
                return [ended(asking.socket), *(ended(one) for one in idle)]

        assert in_child(hold, uid=PERSON) == [False, True] + [False] * 62
        broker.logged("connection-evicted")


def test_roots_connections_are_never_evicted(folder: Path, subuid: Path) -> None:
    with running(folder, subuid, BrokerForTests(connections=32)) as broker:
        roots = [connect(broker.folder / "broker.sock", frozenset({0})) for _ in range(100)]
        held = flood(broker, 4)
        assert serves(broker, STRANGER)
        assert not any(ended(one) for one in roots)
        for one in [*roots, *held]:
            one.close()


def test_an_idle_connection_ends_and_a_client_connects_again_by_itself(folder: Path, subuid: Path) -> None:
    with running(folder, subuid, BrokerForTests(idle=0.2)) as broker, broker.client() as client:
        assert client.status()["broker"]["pid"] == broker.pid
        before = client._connection._socket
        until(lambda: ended(before), "the idle connection ends")
        assert client.status()["broker"]["pid"] == broker.pid
        assert client._connection._socket is not before


def test_a_connection_with_a_request_pending_is_not_idle(folder: Path, subuid: Path) -> None:
    with (
        running(folder, subuid, BrokerForTests(idle=0.2)) as broker,
        PlayedDaemon(broker.folder) as daemon,
        PlayedRequester(broker.folder) as asking,
    ):
        asking.ask(PLEASE)
        daemon.request()
        idle = [connect(broker.folder / "broker.sock", frozenset({0})) for _ in range(3)]
        for one in idle:
            until(partial(ended, one), "others end meanwhile")
        assert not ended(asking.socket)


def test_a_client_never_sends_a_request_again_that_may_have_been_taken(tmp_path: Path) -> None:
    listener = listen(tmp_path / "sock", 0o600)
    listener.setblocking(True)
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            connection = listener.accept()[0]
            connection.recv(4096)
            connection.close()
            connection = listener.accept()[0]  # never comes
            os._exit(3)
        os._exit(4)
    client = LocalConnection(tmp_path / "sock", frozenset({0}))
    with pytest.raises(ConnectionError, match="was closed"):
        client.ask("key", 0, b"x", 5)
    client.close()
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    listener.close()


def test_a_broker_without_free_descriptors_serves_root_and_other_users(folder: Path, subuid: Path) -> None:
    with running(folder, subuid) as broker:
        used = len(os.listdir(f"/proc/{broker.pid}/fd"))
        resource.prlimit(broker.pid, resource.RLIMIT_NOFILE, (used + 8, used + 8))
        held = flood(broker, 2)
        assert serves(broker, STRANGER)
        assert serves(broker, 0)
        for one in held:
            one.close()


def test_a_persons_daemons_are_limited_with_a_clear_refusal(folder: Path, subuid: Path, tmp_path: Path) -> None:
    system = tmp_path / "upcall.toml"
    system.write_text("[broker]\ndaemons-per-person = 2\n")
    with RunningBroker(folder, system=system, settings=BrokerForTests(subuid=subuid)) as broker:
        daemons = [_daemon(broker, uid) for uid in SUBUIDS[:3]]
        try:
            broker.logged("registration-refused uid=")
            assert "why=too-many-daemons" in broker.log
            assert len(broker.status()["daemons"]) == 2
            daemons.append(_daemon(broker, STRANGER))
            until(lambda: len(broker.status()["daemons"]) == 3, "a stranger's daemon registers")
        finally:
            for pid in daemons:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _daemon(broker: RunningBroker, uid: int) -> int:
    """A played daemon of the uid; its process."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setresuid(uid, uid, uid)
            with contextlib.suppress(BaseException), PlayedDaemon(broker.folder):
                signal.pause()
            signal.pause()
        finally:
            os._exit(1)
    return pid


def test_subuid_ranges_are_read_again_on_sighup_and_refused_if_others_can_write(folder: Path, subuid: Path) -> None:
    subuid.chmod(0o666)
    with running(folder, subuid) as broker:
        broker.logged("subuid-refused")
        subuid.chmod(0o644)
        subuid.write_text(f"nonsense\n{PERSON}:{SUBUIDS[0]}:16\n")
        broker.signal(signal.SIGHUP)
        broker.logged("subuid-lines-skipped")
        held = flood(broker, 8)
        until(lambda: sum(not ended(one) for one in held) <= 64, "one person's share")
        for one in held:
            one.close()


@pytest.mark.parametrize("where", ["broker.sock", "registration.sock"])
@pytest.mark.parametrize("read", [True, False], ids=["is read", "is still queued at the end"])
def test_a_descriptor_whose_close_blocks_delays_no_other_request(
    folder: Path, subuid: Path, where: str, read: bool
) -> None:
    """A TCP socket with unsent data that lingers: whoever drops the last reference waits for it in close(2)."""
    with running(folder, subuid, BrokerForTests(rights=True)) as broker, contextlib.ExitStack() as stack:
        sending, _ = lingering(stack)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=i", sending.fileno()))]
        connection = stack.enter_context(connected(broker.folder, STRANGER, where))
        broker.signal(signal.SIGSTOP)  # so that the last reference is the broker's, and not ours
        if not read:
            connection.send(b"\0" * 16)  # nothing that makes sense: what comes behind it is never read
        connection.sendmsg([b"\0" * 16], rights)
        sending.close()
        broker.signal(signal.SIGCONT)
        assert serves(broker, PERSON)  # within the time that a request has, which is less than the socket lingers
        assert serves(broker, 0)
        until(lambda: ended(connection) or None, "it is sent away")


def lingering(stack: contextlib.ExitStack) -> tuple[socket.socket, socket.socket]:
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    sending = stack.enter_context(socket.create_connection(listener.getsockname()))
    other = stack.enter_context(listener.accept()[0])
    sending.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sending.send(bytes(65536))
    sending.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 300))
    return sending, other


def test_the_number_of_links_not_yet_taken_is_limited(folder: Path, subuid: Path) -> None:
    """They are in flight while their connection is unread: it is neither ended nor evicted, and counts."""
    with running(folder, subuid, BrokerForTests(idle=0.05)) as broker:
        held = [connected(broker.folder, STRANGER, "registration.sock") for _ in range(64)]
        for one in held:
            one.send(pack_control(HELO))
        until(lambda: all(select.select([one], [], [], 0)[0] for one in held) or None, "each has its link")
        more = connected(broker.folder, STRANGER, "registration.sock")
        more.settimeout(PATIENCE)
        assert more.recv(1) == b""
        assert not any(one.recv(1, socket.MSG_PEEK) == b"" for one in held)
        for one in (*held, more):
            one.close()

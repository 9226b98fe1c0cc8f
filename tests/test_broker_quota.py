"""The quota source over real sockets: a played kernel warns, a real clerk folds warnings, a real broker delivers.

The broker runs in a thread, the source is turned by the test. tests/test_quota_process.py has both as processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.broker_thread import BrokerThread, Link
from upcall.core.errors import UsageError
from upcall.core.registry import Association
from upcall.kernel.genetlink import Ids, Listener, NoFamily
from upcall.kernel.mounts import Mount
from upcall.process.loop import Loop
from upcall.process.paths import own_place
from upcall.protocols.quota import notice as quotanotice
from upcall.protocols.quota import source
from upcall.protocols.quota import worker as clerk
from upcall.protocols.quota.notice import QuotaNotice
from upcall.protocols.quota.settings import Rules
from upcall.protocols.quota.source import QuotaSetup, QuotaSource
from upcall.protocols.quota.system import read_state, write_state
from upcall.protocols.quota.warning import BHARDWARN, BSOFTWARN, NOTHING, Figures, Warned, pack
from upcall.protocols.quota.warning import Quota as Amounts
from upcall.testing.notices import notice
from upcall.testing.processes import PATIENCE, in_time
from upcall.wire.envelope import MAX_MESSAGE, take_request
from upcall.wire.source_link import pack_status

ALICE, BOB, STAFF, SYSTEM = 5001, 5002, 60, 0
FAMILY = 28
MB = 1 << 20
LIMITS = 100 * MB, 200 * MB
HOME = Mount(os.makedev(7, 0), "/", "/home", "ext4", "/dev/loop0", frozenset())
USERSOCK = 2
RULES = Rules()


def amounts(number: int, used: int) -> Amounts:
    return Amounts(number, Figures(used * MB, *LIMITS, 0), NOTHING)


class PlayedKernel:
    """Sends warnings over a real netlink socket, numbered as the kernel does."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, USERSOCK)
        self.socket.bind((0, 0))
        self.portid: int = self.socket.getsockname()[0]
        self.seq = 0xFFFFFFF0  # it will wrap
        self.buffer, self.group = 16 << 20, 0
        self.to = (0, 0)
        self.full: Callable[[], None]

    def listen(self, ids: Ids) -> Listener:
        found = Listener(self.group, self.buffer, USERSOCK, self.portid)
        self.to = (0, 1 << (self.group - 1)) if self.group else (found.socket.getsockname()[0], 0)
        return found

    def warn(
        self, number: int, warning: int = BHARDWARN, kind: int = 0, cause: int | None = None, minor: int = 0
    ) -> None:
        self.seq += 1
        warned = Warned(kind, number, warning, 7, minor, number if cause is None else cause)
        self.send(pack(warned, FAMILY, self.seq))

    def send(self, data: bytes) -> None:
        """Unlike the kernel's, our messages wait for room; the sending thread also runs the source's loop."""
        while True:
            try:
                self.socket.sendto(data, socket.MSG_DONTWAIT, self.to)
            except BlockingIOError:
                self.full()
                continue
            except ConnectionRefusedError:
                if not self.group:  # after a group it tries portid 0, which nobody has
                    raise
            return


class PlayedWorld:
    """Filesystems and figures as the test wants them."""

    def __init__(self) -> None:
        self.quotas: dict[tuple[int, int], Amounts] = {}
        self.mounted: dict[Mount, tuple[int, ...]] = {HOME: (0, 1, 2)}
        self.go = threading.Event()
        self.go.set()
        self.new = False
        self.graces = {(kind, resource): 0 for kind in range(3) for resource in ("space", "files")}

    def changed(self) -> bool:
        new, self.new = self.new, False
        return new

    def filesystems(self) -> dict[Mount, tuple[int, ...]]:
        return self.mounted

    def get(self, mount: Mount, kind: int, number: int) -> Amounts:
        self.go.wait(PATIENCE)
        return self.quotas.get((kind, number), Amounts(number, NOTHING, NOTHING))

    def some(self, mount: Mount, kind: int, first: int, most: int) -> tuple[list[Amounts], int]:
        found = sorted(number for one, number in self.quotas if one == kind and number >= first)
        return [self.quotas[kind, number] for number in found[:most]], found[most] if len(found) > most else -1

    def grace(self, mount: Mount, kind: int, resource: str) -> int:
        return self.graces[kind, resource]

    def name(self, kind: int, number: int) -> str:
        return {(0, ALICE): "alice", (0, BOB): "bob", (1, STAFF): "staff"}.get((kind, number), str(number))


class House:
    """A broker, and a source that is turned by the test."""

    def __init__(self, folder: Path, world: PlayedWorld, rules: Rules = RULES) -> None:
        self.loop, self.lines = Loop(), []  # type: ignore[var-annotated]
        self.place = own_place(folder)
        self.broker: BrokerThread | None = BrokerThread(folder)
        self.kernel = PlayedKernel()
        self.kernel.full = self.turn
        self.world = world
        self.links: dict[int, Link] = {}
        self.setup = QuotaSetup(rules, folder / "quota.json", Ids(FAMILY, 0), world, self.kernel.listen)
        self.quota: Any = None

    def log(self, event: str, **fields: object) -> None:
        self.lines.append((event, fields))

    def logged(self, event: str) -> dict[str, Any] | None:
        return next((fields for name, fields in self.lines if name == event), None)

    def start(self) -> None:
        self.quota = QuotaSource(self.loop, self.place, self.log, self.setup)

    def open(self) -> House:
        self.start()
        self.until(lambda: not self.quota.why, "listening")
        self.until(lambda: self.quota.clerk._walk.at and not self.quota.clerk._walk.going, "the first reading")
        self.until(lambda: self.quota.link.connected or self.broker is None, "connected")
        return self

    def turn(self, timeout: float = 0.005) -> None:
        self.loop.turn(time.monotonic() + timeout)

    def until(self, true: Callable[[], object], what: str, timeout: float = PATIENCE) -> None:
        end = time.monotonic() + timeout
        while not true():
            assert time.monotonic() < end, f"{what}; {self.quota.status()}; {self.lines}"
            self.turn()

    def settled(self) -> None:
        """Until everything that was sent is seen to, on all sides."""
        quota = self.quota

        def quiet() -> bool:
            nothing = not select.select([quota._listener], [], [], 0)[0] and not len(quota._folding)
            answered = not quota._deliveries or self.broker is None
            return nothing and not quota._busy and quota.clerk.inbox.empty() and not quota._outbox and answered

        for _ in range(3):  # the clerk may have something in hand
            self.until(quiet, "quiet")
            self.turn(0.02)

    def daemon(self, uid: int) -> Association:
        """Registers one; the source has heard of it when this returns."""
        self.links[uid] = link = Link()
        assert self.broker is not None
        found = self.broker.daemon(uid, link)
        if self.quota is not None:
            self.until(lambda: uid in self.quota.link.registered, "heard of")
        return found

    def end_broker(self) -> None:
        """Its daemons' links are closed with it."""
        assert self.broker is not None
        self.broker.close()
        self.broker = None
        if self.quota is not None:
            self.until(lambda: not self.quota.link.connected, "noticed")

    def start_broker(self) -> None:
        self.broker = BrokerThread(self.place.folder)
        self.until(lambda: self.quota.link.connected, "connected again")

    def told(self, uid: int) -> list[QuotaNotice]:
        found = []
        with contextlib.suppress(BlockingIOError):
            while data := self.links[uid].theirs.recv(MAX_MESSAGE):
                envelope = take_request(data)
                assert envelope.service == "quota"
                found.append(quotanotice.take(envelope.body))
        return found

    def wait_told(self, uid: int) -> list[QuotaNotice]:
        """Until there is something."""
        found: list[QuotaNotice] = []

        def look() -> bool:
            found.extend(self.told(uid))
            return bool(found)

        self.until(look, f"{uid} told")
        return found

    def close(self) -> None:
        if self.quota is not None:
            self.quota.close()
        if self.broker is not None:
            self.broker.close()
        self.loop.close()


@pytest.fixture
def world() -> PlayedWorld:
    made = PlayedWorld()
    made.quotas = {(0, ALICE): amounts(ALICE, 10), (0, BOB): amounts(BOB, 10), (1, STAFF): amounts(STAFF, 10)}
    return made


@pytest.fixture
def house(folder: Path, world: PlayedWorld) -> Iterator[House]:
    made = House(folder, world)
    yield made
    made.close()


def events(notices: list[QuotaNotice]) -> list[str]:
    return [notice.event for notice in notices]


# --- who is told ---------------------------------------------------------------------------------------------


def test_a_warning_reaches_only_the_daemon_of_its_subject(house: House) -> None:
    house.open()
    for uid in (ALICE, BOB, SYSTEM):
        house.daemon(uid)
    house.world.quotas[0, ALICE] = amounts(ALICE, 150)
    house.kernel.warn(ALICE, BSOFTWARN, cause=BOB)
    house.settled()
    (notice,) = house.told(ALICE)
    assert notice._replace(at=0) == QuotaNotice(
        "over-soft", "space", quotanotice.Subject("user", ALICE, "alice"), quotanotice.Cause(BOB, "bob"),
        quotanotice.Filesystem("/home", "/dev/loop0", "ext4"), 150 * MB, *LIMITS, None, 150, 0,
        raw=quotanotice.Raw(0, BSOFTWARN, 7, 0),
    )  # fmt: skip
    assert abs(notice.at - time.time()) < 10
    assert house.told(BOB) == house.told(SYSTEM) == []


def test_a_grace_date_not_set_yet_is_computed_from_the_grace_period(house: House) -> None:
    """XFS warns before it sets the date."""
    house.world.graces[0, "space"] = 604800
    house.open().daemon(ALICE)
    house.world.quotas[0, ALICE] = amounts(ALICE, 150)
    house.kernel.warn(ALICE, BSOFTWARN)
    house.settled()
    (notice,) = house.told(ALICE)
    assert notice.grace_until == notice.at + 604800


def test_a_warning_for_a_user_without_a_daemon_reaches_the_system_daemon(house: House) -> None:
    house.open().daemon(SYSTEM)
    house.kernel.warn(ALICE)
    house.settled()
    assert [notice.subject.name for notice in house.told(SYSTEM)] == ["alice"]
    house.daemon(ALICE)
    house.settled()
    assert house.told(ALICE) == []  # once


def test_a_warning_without_any_daemon_is_kept_until_one_registers(house: House) -> None:
    house.open()
    house.kernel.warn(ALICE, BSOFTWARN)
    house.kernel.warn(ALICE, BHARDWARN)
    house.kernel.warn(BOB, BHARDWARN)
    house.settled()
    assert house.quota.status()["undelivered"] == 2
    house.daemon(ALICE)
    house.settled()
    assert [(one.event, one.count) for one in house.told(ALICE)] == [("over-hard", 2)]
    house.daemon(ALICE)
    house.settled()
    assert house.told(ALICE) == []
    house.daemon(SYSTEM)
    house.settled()
    assert [one.subject.id for one in house.told(SYSTEM)] == [BOB]
    assert house.quota.status()["undelivered"] == 0


def test_a_groups_warning_reaches_its_cause_and_the_system_daemon(house: House) -> None:
    house.open()
    for uid in (ALICE, BOB, SYSTEM):
        house.daemon(uid)
    house.kernel.warn(STAFF, kind=1, cause=ALICE)
    house.settled()
    assert house.told(ALICE) == house.told(SYSTEM) != []
    assert house.told(BOB) == []


def test_a_groups_warning_without_its_causes_daemon_reaches_the_system_once(house: House) -> None:
    house.open().daemon(SYSTEM)
    house.kernel.warn(STAFF, kind=1, cause=ALICE)
    house.settled()
    assert [one.cause.name for one in house.told(SYSTEM)] == ["alice"]
    assert house.quota.status()["undelivered"] == 0


def test_the_system_daemon_gets_copies_if_configured(folder: Path, world: PlayedWorld) -> None:
    house = House(folder, world, RULES._replace(copy_to_system=True)).open()
    house.daemon(ALICE)
    house.daemon(SYSTEM)
    house.kernel.warn(ALICE)
    house.settled()
    assert house.told(ALICE) == house.told(SYSTEM) != []
    house.close()


def test_a_daemon_that_was_full_is_sent_the_latest_notice_later(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clerk, "_TRY_AGAIN", 0.05)
    house.open().daemon(ALICE)
    link = house.links[ALICE]
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            sent += link.ours.send(b"x" * 1000)
    house.kernel.warn(ALICE, BSOFTWARN)
    house.kernel.warn(ALICE, BHARDWARN)
    house.settled()
    house.until(lambda: house.quota.status()["undelivered"] == 1, "one that waits")
    for _ in range(sent // 1000):  # what comes behind them may have come by now
        assert len(link.theirs.recv(MAX_MESSAGE)) == 1000
    notices = house.wait_told(ALICE)
    assert [(one.event, one.count) for one in notices] == [("over-hard", 2)]


# --- early warnings ------------------------------------------------------------------------------------------


def test_a_user_near_a_limit_is_notified_without_a_kernel_warning(house: House) -> None:
    house.world.quotas[0, ALICE] = amounts(ALICE, 92)
    house.world.quotas[0, 0] = amounts(0, 99)  # never held to its limits
    house.daemon(ALICE)
    house.daemon(SYSTEM)
    house.open()
    notices = house.wait_told(ALICE)
    assert [(one.event, one.percent) for one in notices] == [("near", 92)]
    house.settled()
    assert house.told(SYSTEM) == []


def test_a_scan_of_more_quotas_than_one_turn_takes_finds_each_user_near_a_limit(house: House) -> None:
    house.world.quotas = {(0, uid): amounts(uid, 10) for uid in range(1, 1000)}
    house.world.quotas[0, 998] = amounts(998, 85)
    house.daemon(998)
    house.open()
    notices = house.wait_told(998)
    assert events(notices) == ["near"]


# --- floods and loss -----------------------------------------------------------------------------------------


def test_a_flood_of_warnings_is_folded_and_hides_no_other_user(house: House) -> None:
    house.open().daemon(ALICE)
    house.daemon(BOB)
    before = resident()
    for number in range(100_000):
        house.kernel.warn(ALICE)
        if number == 50_000:
            house.kernel.warn(BOB)
        if number % 100 == 99:
            house.turn(0)
    house.settled()
    assert resident() - before < 8 * MB
    status = house.quota.status()
    assert (status["received"], status["lost"], status["dropped"]) == (100_001, 0, 0)
    assert status["folded"] > 99_000
    assert events(house.told(ALICE)) == events(house.told(BOB)) == ["over-hard"]


def resident() -> int:
    """This process's memory, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_warnings_received_while_the_clerk_blocks_are_delivered(house: House) -> None:
    house.open().daemon(ALICE)
    house.daemon(BOB)
    house.world.go.clear()
    for _ in range(5000):
        house.kernel.warn(ALICE)
        house.turn(0)
    house.kernel.warn(BOB)
    assert house.quota._busy
    house.world.go.set()
    house.settled()
    assert events(house.told(ALICE)) == events(house.told(BOB)) == ["over-hard"]
    assert house.quota.status()["received"] == 5001


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may send to a group")
def test_lost_warnings_are_counted_exactly_and_made_up_for_by_a_scan(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_SURE", 0.1)
    monkeypatch.setattr("upcall.protocols.quota.scan._SOON", 0.1)
    house.kernel.group, house.kernel.buffer = 31, 65536
    house.open().daemon(ALICE)
    house.daemon(BOB)
    house.kernel.warn(ALICE)
    house.settled()
    house.told(ALICE)
    for _ in range(5000):
        house.kernel.warn(ALICE)
    house.kernel.warn(BOB)  # lost, too
    house.world.quotas[0, BOB] = amounts(BOB, 200)
    house.turn()
    house.settled()
    house.kernel.warn(ALICE)  # the buffer is empty again
    notices = house.wait_told(BOB)
    assert events(notices) == ["over-hard"]
    house.until(lambda: house.logged("quota-warnings-lost"), "the loss is known")
    status = house.quota.status()
    assert status["overflows"] > 0
    assert 0 < status["received"] < 1000
    assert status["received"] + status["lost"] == 5003
    logged = house.logged("quota-warnings-lost")
    assert logged is not None
    assert logged["messages"] == status["lost"]
    house.kernel.warn(STAFF, kind=1, cause=BOB)
    (notice,) = house.wait_told(BOB)
    assert notices[0].lost + notice.lost == status["lost"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may send to a group")
def test_a_loss_without_a_later_warning_still_starts_a_scan(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of lost warnings is not known yet; the overflow alone starts a scan."""
    monkeypatch.setattr("upcall.protocols.quota.scan._SOON", 0.1)
    house.kernel.group, house.kernel.buffer = 31, 65536
    house.open().daemon(BOB)
    for _ in range(5000):
        house.kernel.warn(ALICE)
    house.kernel.warn(BOB)
    house.world.quotas[0, BOB] = amounts(BOB, 200)
    assert events(house.wait_told(BOB)) == ["over-hard"]
    status = house.quota.status()
    assert (status["overflows"], status["lost"]) == (1, 0)


def test_a_warning_from_another_process_is_counted_and_dropped(house: House) -> None:
    house.open().daemon(ALICE)
    other = PlayedKernel()
    other.to = house.kernel.to
    other.warn(ALICE)
    house.until(lambda: house.quota.status()["nonsense"] == 1, "counted")
    assert house.quota.status()["received"] == 0


def test_malformed_warnings_are_counted_and_later_ones_delivered(house: House) -> None:
    house.open().daemon(ALICE)
    house.kernel.send(b"x" * 76)
    house.kernel.send(pack(Warned(7, ALICE, 4, 7, 0, ALICE), FAMILY, 1))  # an unknown kind of quota
    house.kernel.send(pack(Warned(0, 1 << 40, 4, 7, 0, ALICE), FAMILY, 2))
    house.kernel.send(pack(Warned(0, ALICE, 4, 0xFFFFFFFF, 0xFFFFFFFF, ALICE), FAMILY, 3))
    house.settled()
    assert house.quota.status()["nonsense"] >= 3
    house.kernel.seq = 3
    house.kernel.warn(ALICE)
    house.settled()
    assert "over-hard" in events(house.told(ALICE))


def test_a_warning_for_an_unseen_filesystem_is_delivered_without_figures(house: House) -> None:
    house.world.mounted = {}
    house.open().daemon(ALICE)
    house.kernel.warn(ALICE)
    house.settled()
    (notice,) = house.told(ALICE)
    assert notice.filesystem == quotanotice.Filesystem(None, "7:0", "")
    assert (notice.used, notice.hard, notice.percent) == (0, 0, None)


# --- the end, and the next beginning -------------------------------------------------------------------------


def test_a_warning_for_a_newly_mounted_filesystem_carries_its_figures(house: House) -> None:
    disk = Mount(os.makedev(7, 9), "/", "/disk", "ext4", "/dev/loop9", frozenset())
    house.open().daemon(ALICE)
    house.world.mounted, house.world.new = {**house.world.mounted, disk: (0,)}, True
    house.world.quotas[0, ALICE] = amounts(ALICE, 11)
    house.kernel.warn(ALICE, minor=9)
    house.settled()
    assert [(one.filesystem.mount, one.used) for one in house.told(ALICE)] == [("/disk", 11 * MB)]


def test_a_restart_repeats_no_notice_and_forgets_no_undelivered_one(house: House, folder: Path) -> None:
    house.world.quotas[0, ALICE] = amounts(ALICE, 200)
    house.daemon(ALICE)
    house.open()
    house.kernel.warn(ALICE)
    house.kernel.warn(BOB)
    house.settled()
    assert events(house.told(ALICE)) == ["over-hard"]
    house.quota.close()
    assert (folder / "quota.json").stat().st_mode & 0o777 == 0o600

    house.kernel = PlayedKernel()
    house.setup = house.setup._replace(listen=house.kernel.listen)
    house.open()
    house.kernel.warn(ALICE)
    house.settled()
    assert house.told(ALICE) == []
    house.daemon(BOB)
    house.settled()
    assert events(house.told(BOB)) == ["over-hard"]


def test_the_old_state_survives_a_kill_during_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old file is there, complete; the next write removes the leftover temporary file."""
    state = tmp_path / "quota.json"
    write_state(state, b"before")
    pid = os.fork()
    if pid == 0:
        try:
            monkeypatch.setattr(Path, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            write_state(state, b"never")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert read_state(state) == b"before"
    assert len(list(tmp_path.iterdir())) == 2
    write_state(state, b"after")
    assert read_state(state) == b"after"
    assert list(tmp_path.iterdir()) == [state]


def test_warnings_that_arrive_at_shutdown_are_delivered_or_saved(house: House) -> None:
    house.open().daemon(ALICE)
    house.settled()
    house.kernel.warn(ALICE)
    house.kernel.warn(BOB)
    house.quota.close()
    house.quota = None
    assert events(house.told(ALICE)) == ["over-hard"]
    assert [uid for uid, _ in json.loads(house.setup.state.read_text())["kept"]] == [BOB]


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 3}'])
def test_a_damaged_state_file_is_logged_and_warnings_still_delivered(house: House, content: str) -> None:
    house.setup.state.touch(0o600)
    house.setup.state.write_text(content)
    house.open().daemon(ALICE)
    house.until(lambda: house.logged("quota-state-read-failed"), "logged")
    house.kernel.warn(ALICE)
    house.settled()
    assert events(house.told(ALICE)) == ["over-hard"]


def test_a_state_file_that_others_can_write_is_not_read(house: House) -> None:
    house.setup.state.write_text('{"version": 1}')
    house.setup.state.chmod(0o666)
    house.open()
    house.until(lambda: house.logged("quota-state-read-failed"), "logged")


def test_a_state_file_that_cannot_be_written_is_logged(house: House) -> None:
    house.setup = house.setup._replace(state=Path("/proc/nowhere/quota.json"))
    house.open()
    house.quota.close()
    house.quota = None
    assert house.logged("quota-state-write-failed") is not None


def test_a_kernel_without_the_netlink_family_switches_quota_off_with_a_reason(house: House) -> None:
    def refuse(_: Ids) -> Listener:
        raise NoFamily("there is no generic netlink family VFS_DQUOT here")

    house.setup = house.setup._replace(listen=refuse)
    house.start()
    house.until(lambda: house.logged("quota-listen-failed"), "logged")
    status = house.quota.status()
    assert not status["listening"]
    assert "VFS_DQUOT" in status["why"]


def test_a_kernel_that_does_not_answer_yet_is_asked_again_and_logged_once(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_ASK_AGAIN", 0.01)
    tries = []

    def listen(ids: Ids) -> Listener:
        tries.append(ids)
        if len(tries) < 4:
            raise UsageError("timed out")
        return house.kernel.listen(ids)

    house.setup = house.setup._replace(listen=listen)
    house.open().daemon(ALICE)
    assert house.logged("quota-listen-failed") == {"why": "timed out"}
    assert [event for event, _ in house.lines].count("quota-listen-failed") == 1
    house.kernel.warn(ALICE)
    house.settled()
    assert events(house.told(ALICE)) == ["over-hard"]


def test_shutdown_does_not_wait_for_a_kernel_that_does_not_answer(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Ids) -> Listener:
        raise OSError("not now")

    house.setup = house.setup._replace(listen=refuse)
    house.start()
    house.until(lambda: house.logged("quota-listen-failed"), "logged")
    monkeypatch.setattr(source, "_LAST_WORDS", 3600.0)
    in_time(house.quota.close, "the end")
    house.quota = None
    assert house.logged("quota-worker-blocked") is None


def test_shutdown_does_not_wait_for_a_clerk_that_hangs(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_LAST_WORDS", 0.1)
    house.open()
    house.settled()
    house.world.go.clear()
    house.kernel.warn(ALICE)
    house.until(lambda: house.quota._busy, "in the clerk's hands")
    house.quota.close()
    house.world.go.set()
    house.quota = None
    assert house.logged("quota-worker-blocked") is not None


# --- without a broker, with another one, with one that takes no more ------------------------------------------


def test_a_warning_received_without_a_broker_is_delivered_once_by_the_next(house: House) -> None:
    house.open()
    house.end_broker()
    house.kernel.warn(ALICE)
    house.settled()
    assert house.quota.status()["undelivered"] == 1
    house.start_broker()
    house.daemon(ALICE)
    house.settled()
    assert events(house.told(ALICE)) == ["over-hard"]
    house.daemon(ALICE)
    house.settled()
    assert house.told(ALICE) == []


def test_the_system_daemons_copy_is_kept_until_a_broker_is_there(folder: Path, world: PlayedWorld) -> None:
    house = House(folder, world, RULES._replace(copy_to_system=True)).open()
    house.end_broker()
    house.kernel.warn(ALICE)
    house.settled()
    house.broker = BrokerThread(folder)  # both are registered before the source comes back
    house.quota, quota = None, house.quota
    house.daemon(ALICE)
    house.daemon(SYSTEM)
    house.quota = quota
    house.until(lambda: quota.link.connected, "connected again")
    house.settled()
    assert events(house.told(ALICE)) == events(house.told(SYSTEM)) == ["over-hard"]
    house.close()


def test_a_source_that_ends_while_it_connects_delivers_first(folder: Path, house: House) -> None:
    house.open()
    house.end_broker()
    house.kernel.warn(ALICE)
    house.until(lambda: house.quota.status()["undelivered"] == 1, "it waits")
    house.broker = BrokerThread(folder)
    house.quota, quota = None, house.quota
    house.daemon(ALICE)
    house.quota = quota
    house.until(lambda: quota.link.lives, "connecting")
    assert not quota.link.connected
    house.quota.close()
    house.quota = None
    assert events(house.told(ALICE)) == ["over-hard"]


def test_a_source_that_ends_without_a_broker_saves_its_undelivered_notices(house: House) -> None:
    house.open()
    house.end_broker()
    house.kernel.warn(ALICE)
    house.settled()
    house.quota.close()
    assert [uid for uid, _ in json.loads(house.setup.state.read_text())["kept"]] == [ALICE]
    house.kernel = PlayedKernel()
    house.setup = house.setup._replace(listen=house.kernel.listen)
    house.open()
    house.start_broker()
    house.daemon(ALICE)
    house.settled()
    assert events(house.told(ALICE)) == ["over-hard"]


def test_notices_in_flight_are_part_of_the_saved_state(house: House) -> None:
    """A source killed now would find the notice in its state after a restart."""
    house.open()
    house.end_broker()
    house.kernel.warn(ALICE)
    house.settled()
    assert len(house.quota.clerk.handed) == 1
    house.quota.clerk.save()
    assert [uid for uid, _ in json.loads(house.setup.state.read_text())["kept"]] == [ALICE]


def test_notices_beyond_the_queue_to_the_broker_are_kept_and_delivered_later(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_WITHOUT_BROKER", 4)
    house.open()
    house.end_broker()
    for uid in range(6001, 6011):
        house.kernel.warn(uid)
    house.settled()
    assert (len(house.quota._deliveries), len(house.quota.clerk.kept)) == (4, 6)
    house.start_broker()
    house.daemon(SYSTEM)
    house.settled()
    assert sorted(one.subject.id for one in house.told(SYSTEM)) == list(range(6001, 6011))
    assert house.quota.status()["undelivered"] == 0


def test_notices_to_a_broker_that_is_full_are_delivered_once_it_reads_again(house: House) -> None:
    """Its thread hangs, and the socket to it is small: no notice is lost or repeated."""
    house.open().daemon(SYSTEM)
    gate, uids = threading.Event(), list(range(6001, 6101))
    assert house.broker is not None
    house.broker.begin(lambda: gate.wait(PATIENCE))
    house.quota.link._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    for uid in uids:
        house.kernel.warn(uid)
    house.until(lambda: 0 < house.quota._in_flight < source._IN_FLIGHT and len(house.quota._sends) > 50, "it is full")
    assert house.told(SYSTEM) == []
    gate.set()
    house.settled()
    assert sorted(one.subject.id for one in house.told(SYSTEM)) == uids


def test_notices_unread_when_a_broker_ends_are_delivered_by_the_next(house: House) -> None:
    house.open().daemon(SYSTEM)
    first, gate, uids = house.links[SYSTEM], threading.Event(), list(range(6001, 6041))
    assert house.broker is not None
    house.broker.begin(lambda: gate.wait(PATIENCE))
    for uid in uids:
        house.kernel.warn(uid)
    house.until(lambda: house.quota._in_flight == len(uids), "on their way")
    house.broker.server.stop()
    gate.set()
    house.end_broker()
    house.start_broker()
    house.daemon(SYSTEM)
    house.settled()
    told = house.told(SYSTEM)
    house.links[SYSTEM] = first
    assert sorted(one.subject.id for one in (*house.told(SYSTEM), *told)) == uids


def test_a_daemon_that_registers_during_a_delivery_gets_the_notice(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It registers after the broker answered that there is none, and before the notice has its outcome."""
    monkeypatch.setattr(clerk, "_TRY_AGAIN", 0.05)
    house.open()
    settle = house.quota._settle
    came: list[int] = []

    def late(delivery: Any, uid: int, outcome: Any) -> None:
        if uid == ALICE and not came:
            came.append(uid)
            house.daemon(ALICE)
        settle(delivery, uid, outcome)

    monkeypatch.setattr(house.quota, "_settle", late)
    house.kernel.warn(ALICE)
    house.until(lambda: bool(came), "nobody is there")
    assert events(house.wait_told(ALICE)) == ["over-hard"]


def test_a_second_source_is_refused_and_leaves_the_state_file_alone(house: House) -> None:
    house.open()
    house.settled()
    house.quota.clerk.save()
    before = house.setup.state.read_bytes()
    other = QuotaSource(house.loop, house.place, house.log, house.setup)
    house.until(lambda: other.superfluous, "refused")
    assert house.quota.link.connected
    other.clerk.kept.put(ALICE, notice())
    other.close()
    assert house.setup.state.read_bytes() == before


def test_the_brokers_status_shows_the_quota_source_to_root_only(house: House) -> None:
    house.open()
    assert house.broker is not None
    server = house.broker.server

    def said() -> Any:
        assert house.broker is not None
        return house.broker.do(lambda: server.status(None))["quota"]

    house.until(lambda: said().get("listening"), "it is said that it listens")
    house.kernel.warn(ALICE)
    house.until(lambda: (said()["received"], said()["undelivered"]) == (1, 1), "and what it has heard")
    assert "quota" not in house.broker.do(lambda: server.status(1000))  # for root only
    house.quota.close()
    house.quota = None
    house.broker.do(lambda: None)
    while said():
        pass


def test_a_long_list_of_filesystems_is_cut_to_fit_a_status_message(house: House) -> None:
    house.world.mounted = {HOME._replace(point=f"/{'x' * 200}/{n}", device=n): (0,) for n in range(100)}
    house.open()
    house.until(lambda: len(house.quota.clerk.filesystems) == 100, "they are known")
    assert 10 < len(house.quota.status()["filesystems"]) < 100
    pack_status("quota", 0, house.quota.status())

"""NFSv4's names and ids on a real mount: files belong to the same people, whether nfsidmap answers or we."""

from __future__ import annotations

import errno
import os
import platform
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from upcall_idmap import IdResolver

from tests.kernel.nfs_scene import (
    DOMAIN,
    OTHER_DOMAIN,
    STALLED,
    Server,
    by_the_peer,
    by_us,
    furnished,
    is_running,
    missing,
    mounted,
    owned_file,
    requested,
)
from tests.kernel.scene import House, attempt, begin
from upcall.testing.lab.stage import PATIENCE, Person, Task, wait_until

pytestmark = pytest.mark.skipif(
    bool(missing()) or platform.machine() != "x86_64", reason=f"needs {', '.join(missing()) or 'x86-64'}"
)
UNMAPPED = 0xFFFFFFFE  # what the kernel's client makes of a name that it is refused
NOBODY, NOGROUP = 65534, 65534
WHOSE = {"peer": by_the_peer, "ours": by_us}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder, furnished(Path(folder)):
        made = Server(Path(folder))
        made.start()
        try:
            yield made
        finally:
            made.stop()


@pytest.fixture(scope="module", autouse=True)
def house(server: Server, root: Person) -> Iterator[House]:
    made = House()
    try:
        made.open()
        made.daemon(root, IdResolver)
        yield made
    finally:
        made.close()


@pytest.fixture(params=list(WHOSE))
def answering(request: pytest.FixtureRequest) -> Iterator[str]:
    with WHOSE[request.param]():
        yield request.param


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "mnt"


def owner(root: Person, path: Path) -> tuple[int, int]:
    """(uid, gid) as stat(2) in a child gives them."""
    outcome = attempt(root, lambda: tuple(path.stat()[stat.ST_UID : stat.ST_GID + 1]))
    assert outcome.errno == 0, outcome
    assert isinstance(outcome.value, tuple)
    return outcome.value


# --- every answer, side by side ------------------------------------------------------------------------------------

SAME = [
    "uid:root@lab.test", "uid:alice@lab.test", "uid:bob@lab.test", "uid:ALICE@lab.test", "uid:alice@LAB.TEST",
    "uid:alice@other.test", "uid:alice@sub.lab.test", "uid:alice@lab.test.", "uid:alice@", "uid:@lab.test",
    "uid:alice", "uid:carol@lab.test", "uid:alice@lab.test@other.test", "uid:alice@other.test@lab.test",
    "uid:nobody@lab.test", "uid:a b@lab.test", "uid:j\u00fcrgen@lab.test", "uid:5001", "uid:0", "uid:5001@lab.test",
    "uid:x5001@other.test",
    "gid:root@lab.test", "gid:alice@lab.test", "gid:staff@lab.test", "gid:staff@other.test", "gid:nothere@lab.test",
    "user:0", "user:5001", "user:5002", "user:65534", "group:0", "group:50", "group:5001",
]  # fmt: skip
# What each answers where it is different on purpose: docs/idmap.md.
DIFFERENT = {
    "uid:5001": (b"5001\0", b"65534\0"),  # which a kernel never asks for: it takes the digits itself
    "uid:0": (b"0\0", b"65534\0"),
    "uid:5001abc@other.test": (b"5001\0", b"65534\0"),
    "uid:0x@other.test": (b"65534\0", b"65534\0"),
    "user:7777": (errno.ENOKEY, errno.ENOENT),
    "group:7777": (errno.ENOKEY, errno.ENOENT),
    "user:4294967294": (errno.ENOKEY, errno.ENOENT),
    "user:4294967295": (errno.ENOKEY, errno.EACCES),
    "user:x": (b"root@lab.test", errno.EACCES),
    "nonsense:1": (errno.ENOKEY, errno.EACCES),
}


def test_every_answer_is_nfsidmaps_but_for_those_that_are_meant_to_differ(house: House, root: Person) -> None:
    asked = [*dict.fromkeys([*SAME, *DIFFERENT])]
    answers = []
    for answering in (by_the_peer, by_us):
        with answering():
            answers.append(Task(root, lambda: {name: requested(name) for name in asked}).result(4 * PATIENCE))
    theirs, ours = answers
    for description in asked:
        mark = "" if theirs[description] == ours[description] else "  <- different"
        print(f"{description:<34} {theirs[description]!r:<28} {ours[description]!r}{mark}")
    same = [description for description in SAME if description not in DIFFERENT]
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    assert {name: (theirs[name], ours[name]) for name in DIFFERENT} == DIFFERENT


# --- on a mount ----------------------------------------------------------------------------------------------------


def test_files_belong_to_the_same_people(
    answering: str, server: Server, root: Person, alice: Person, bob: Person, folder: Path
) -> None:
    owned_file("alices", alice.uid, alice.gid)
    owned_file("bobs", bob.uid, 50)
    owned_file("carols", 5003, 0)  # a name that only the server knows
    owned_file("numbers", 7777, 7777)  # and ids that nobody has, for which rpc.idmapd sends nobody's name
    with mounted(folder):
        assert owner(root, folder / "alices") == (alice.uid, alice.gid)
        assert owner(root, folder / "bobs") == (bob.uid, 50)
        assert owner(root, folder / "carols") == (NOBODY, 0)
        assert owner(root, folder / "numbers") == (NOBODY, NOGROUP)


def test_names_of_another_domain_are_nobodys(
    answering: str, server: Server, root: Person, alice: Person, folder: Path
) -> None:
    owned_file("alices", alice.uid, alice.gid)
    server.calls_people(OTHER_DOMAIN)
    try:
        with mounted(folder):
            assert owner(root, folder / "alices") == (NOBODY, NOGROUP)
            refused = attempt(root, lambda: os.chown(folder / "alices", 5002, -1))
            assert refused.errno == errno.EINVAL  # the server does not know bob@lab.test
    finally:
        server.calls_people(DOMAIN)
    with mounted(folder):
        assert owner(root, folder / "alices") == (alice.uid, alice.gid)


def test_chown_sends_names_and_refuses_ids_without_one(
    answering: str, root: Person, alice: Person, bob: Person, folder: Path
) -> None:
    there = owned_file("given", alice.uid, alice.gid)
    with mounted(folder):
        assert attempt(root, lambda: os.chown(folder / "given", bob.uid, bob.gid)).errno == 0
        assert there.stat()[stat.ST_UID : stat.ST_GID + 1] == (bob.uid, bob.gid)
        assert owner(root, folder / "given") == (bob.uid, bob.gid)
        # An id without a name here: the kernel sends digits, which a server with names does not take.
        assert attempt(root, lambda: os.chown(folder / "given", 7777, -1)).errno == errno.EINVAL
        assert there.stat().st_uid == bob.uid


# --- a name service that hangs -------------------------------------------------------------------------------------


def test_with_nfsidmap_a_silent_name_service_hangs_the_caller(root: Person, folder: Path) -> None:
    """What the next test is there for."""
    owned_file("stalled", 6001)
    with by_the_peer(), mounted(folder):
        STALLED.touch()
        try:
            looking = begin(root, lambda: (folder / "stalled").stat().st_uid)
            wait_until(lambda: is_running("nfsidmap"), "nfsidmap")
            assert not looking.ended
        finally:
            STALLED.unlink()
        assert looking.result().value == NOBODY


def test_a_name_service_that_hangs_is_given_up_and_others_are_answered(
    house: House, root: Person, alice: Person, folder: Path
) -> None:
    owned_file("stalled", 6002)
    owned_file("alices", alice.uid, alice.gid)
    with by_us(), mounted(folder):
        STALLED.touch()
        try:
            assert owner(root, folder / "stalled")[0] == UNMAPPED
            assert owner(root, folder / "alices") == (alice.uid, alice.gid)
            assert "name-service-silent" in house.log()
        finally:
            STALLED.unlink()
        # The refusal is over within two seconds, and nothing of it is remembered.
        wait_until(lambda: owner(root, folder / "stalled")[0] == NOBODY, "an answer again")


# --- whom upcall answers -------------------------------------------------------------------------------------------


def test_only_the_kernel_and_root_are_answered(house: House, alice: Person) -> None:
    with by_us():

        def work() -> int:
            found = requested("uid:root@lab.test")
            return found if isinstance(found, int) else 0

        assert attempt(alice, work).value in (errno.EACCES, errno.ENOKEY)
        assert "forged" in house.log()


def test_the_legacy_type_never_comes_to_request_key(house: House, root: Person, folder: Path) -> None:
    """The kernel asks for it when id_resolver is refused: by a pipe to rpc.idmapd, which is not there."""
    owned_file("given", 0)
    with by_us(), mounted(folder):
        before = house.log()
        assert attempt(root, lambda: os.chown(folder / "given", 7778, -1)).errno == errno.EINVAL
        said = house.log()[len(before) :]
        assert "no-such-name" in said
        assert "unknown-type" not in said
        legacy = [line for line in Path("/proc/keys").read_text().splitlines() if "id_legacy" in line]
        assert any("user:7778" in line for line in legacy), legacy

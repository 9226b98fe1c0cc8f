"""Attacks on the source that mounts for users, on the real kernel: each is refused with a reason, or does no harm."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kernel.mount_scene import (
    CONFIG,
    NEW_MOUNTS,
    NEW_USER,
    SOCKET,
    Answer,
    ask,
    ask_away,
    asked,
    be_seen,
    folder,
    made,
    points,
    raw,
    reply_of,
    request,
    source,
    take_all_away,
    unshare,
)
from tests.kernel.scene import enrol, keys
from upcall.kernel import keyring, libc
from upcall.kernel.local import connect
from upcall.kernel.mounts import mounts
from upcall.protocols.ecryptfs.mounted import lower_folders, mount_above
from upcall.protocols.ecryptfs.mounting import client
from upcall.protocols.ecryptfs.mounting.messages import MOUNT, UNMOUNT, MountRequest, pack_request
from upcall.testing.lab.stage import Person, Task, mount, person, wait_until

KEY = keys()["rsa2048"]
LOG = Path("/tmp/mount-attacks.log")
ROOT = Path("/home/alice")
MAX = 3


@pytest.fixture(scope="module")
def alice() -> Person:
    found = person("alice")
    enrol(found, KEY)
    return found


@pytest.fixture(scope="module")
def bob() -> Person:
    return person("bob")


@pytest.fixture(scope="module")
def serving(alice: Person) -> Iterator[Task[None]]:
    with source(LOG, f'users = ["alice", "bob"]\nmax = {MAX}\n') as task:
        yield task


@pytest.fixture
def lower(alice: Person) -> Path:
    return folder(ROOT / "lower", alice)


@pytest.fixture
def upper(alice: Person) -> Path:
    return folder(ROOT / "upper", alice)


@pytest.fixture(autouse=True)
def _clean(serving: Task[None], alice: Person, lower: Path, upper: Path) -> Iterator[None]:
    """Before: credit for requests. After: the source serves still, and nothing is left."""
    yield
    take_all_away()
    wait_until(lambda: ask(alice, KEY.signature, lower, upper).status == 0, "it serves, and has credit")
    assert points() == [str(upper)]
    assert ask_away(alice, upper).status == 0
    assert made() == []


def refused(answer: Answer, *words: str, status: int = os.EX_NOPERM) -> None:
    assert answer.status == status, answer
    assert all(word in answer.text for word in words), answer


# --- folders -------------------------------------------------------------------------------------------------------


def test_a_folder_of_another_user_is_refused_on_both_sides(
    alice: Person, bob: Person, lower: Path, upper: Path
) -> None:
    Path("/home/bob").chmod(0o755)
    theirs = folder(Path("/home/bob/open"), bob, 0o755)
    refused(ask(alice, KEY.signature, theirs, upper), "belongs to uid 5002", "must be your own (uid 5001)")
    refused(ask(alice, KEY.signature, lower, theirs), "belongs to uid 5002")
    assert made() == []


@pytest.mark.parametrize("path", ["/etc", "/", "/home", "/usr/bin", "/tmp"])
def test_a_folder_of_the_system_is_refused(alice: Person, lower: Path, path: str) -> None:
    answer = ask(alice, KEY.signature, lower, Path(path))
    assert answer.status in (os.EX_NOPERM, os.EX_TEMPFAIL), answer
    assert made() == []


def test_a_folder_above_what_belongs_to_others_is_refused(alice: Person, lower: Path) -> None:
    above = folder(ROOT / "above", alice, 0o755)
    (above / "etc").mkdir(exist_ok=True)
    refused(ask(alice, KEY.signature, lower, above), "is not empty", status=os.EX_USAGE)


def test_a_folder_of_the_kernels_is_refused(alice: Person, lower: Path, upper: Path) -> None:
    """A process's own folder in /proc belongs to its user."""

    def on_proc(which: str) -> Answer:
        be_seen()
        mine = Path(f"/proc/{os.getpid()}")
        pair = (mine, upper) if which == "lower" else (lower, mine)
        return asked(lambda: client.ask_mount(MountRequest(MOUNT, "private", (KEY.signature,)), *pair))

    for which in ("lower", "upper"):
        refused(Task(alice, lambda which=which: on_proc(which)).result(), f"the {which} folder is on proc")  # type: ignore[misc]


def test_a_folder_that_others_can_write_to_is_refused(alice: Person, lower: Path, upper: Path) -> None:
    shared = folder(ROOT / "shared", alice, 0o770)
    refused(ask(alice, KEY.signature, shared, upper), "mode 0770", "chmod go-w")
    refused(ask(alice, KEY.signature, lower, shared), "mode 0770")


def test_what_a_mount_forbids_is_forbidden_in_what_lies_over_it(alice: Person, upper: Path) -> None:
    """An administrator's noexec holds, and so does a read-only bind mount, which eCryptfs does not heed."""
    disk = ROOT / "disk"
    disk.mkdir(exist_ok=True)
    libc.call("mount", b"tmpfs", os.fsencode(disk), b"tmpfs", 8, b"mode=0755")  # MS_NOEXEC
    lower = folder(disk / "lower", alice)
    try:
        assert ask(alice, KEY.signature, lower, upper).status == 0
        (found,) = made()
        assert {"nosuid", "nodev", "noexec"} <= found.options
        assert ask_away(alice, upper).status == 0
        libc.call("mount", os.fsencode(lower), os.fsencode(lower), None, 4096, None)  # MS_BIND
        libc.call("mount", None, os.fsencode(lower), None, 4096 | 32 | 1, None)  # and MS_REMOUNT, MS_RDONLY
        refused(ask(alice, KEY.signature, lower, upper), "is mounted read-only")
    finally:
        take_all_away()
        with contextlib.suppress(OSError):
            libc.call("umount2", os.fsencode(lower), 2)
        libc.call("umount2", os.fsencode(disk), 2)


def test_folders_within_each_other_are_refused(alice: Person, lower: Path) -> None:
    inner = folder(lower / "inner", alice)
    refused(ask(alice, KEY.signature, lower, inner), "lies within the other", status=os.EX_USAGE)
    refused(ask(alice, KEY.signature, inner, lower), "lies within the other", status=os.EX_USAGE)
    refused(ask(alice, KEY.signature, lower, lower), "lies within the other", status=os.EX_USAGE)
    inner.rmdir()


def test_a_mount_is_not_mounted_over(alice: Person, lower: Path, upper: Path) -> None:
    other = folder(ROOT / "other", alice)
    assert ask(alice, KEY.signature, lower, upper).status == 0
    refused(ask(alice, KEY.signature, other, upper, "second"), "is a mount already", status=os.EX_TEMPFAIL)
    refused(ask(alice, KEY.signature, upper, other, "second"), "the lower folder is on ecryptfs")
    refused(ask(alice, KEY.signature, lower, other), "is mounted already", status=os.EX_TEMPFAIL)
    assert points() == [str(upper)]


def test_a_user_has_so_many_mounts_and_no_more(alice: Person, lower: Path) -> None:
    answers = []
    for number in range(MAX + 1):
        upper = folder(ROOT / f"many-{number}", alice)
        answers.append(ask(alice, KEY.signature, lower, upper, f"many-{number}"))
    assert [answer.status for answer in answers] == [0] * MAX + [os.EX_TEMPFAIL]
    assert f"you have {MAX} mounts, and may have {MAX}" in answers[-1].text
    assert len(made()) == MAX


# --- swapping ------------------------------------------------------------------------------------------------------


def test_a_symbolic_link_is_followed_nowhere(alice: Person, bob: Person, lower: Path) -> None:
    link = ROOT / "link"
    link.symlink_to("/home/bob")

    def work() -> str:
        try:
            client.ask_mount(MountRequest(MOUNT, "private", (KEY.signature,)), lower, link)
        except OSError as error:
            return f"{error.filename}: {error.strerror}"
        return "mounted"

    told = Task(alice, work).result()
    assert told == f"{link}: is a symbolic link, which is not followed: name the folder itself (/home/bob)"
    link.unlink()


def test_a_folder_swapped_between_check_and_mount_gets_the_mount_or_none(
    alice: Person, bob: Person, lower: Path
) -> None:
    """A loop exchanges the upper folder and a link to one of bob's, and another the folder above it."""
    victim = folder(Path("/home/bob/victim"), alice)  # so that nothing but the swap protects it
    Path("/home/bob").chmod(0o755)
    nest = folder(ROOT / "nest", alice)
    target = folder(nest / "target", alice)
    (nest / "link").symlink_to(victim)
    (ROOT / "nest-link").symlink_to("/home/bob")
    stop = ROOT / "stop"

    def swap() -> None:
        while not stop.exists():
            exchange(nest / "target", nest / "link")
            exchange(ROOT / "nest", ROOT / "nest-link")
            exchange(ROOT / "nest", ROOT / "nest-link")
            exchange(nest / "link", nest / "target")

    def attack() -> list[str]:
        be_seen()
        told = []
        for _ in range(12):
            try:
                told.append(asked(lambda: client.ask_mount(wanted, lower, target)).text)
            except OSError as error:
                told.append(str(error.strerror))
                continue
            with contextlib.suppress(OSError):
                asked(lambda: client.ask_unmount("private", Path(told[-1])))
        return told

    wanted = MountRequest(MOUNT, "private", (KEY.signature,))
    swapper = Task(alice, swap)
    try:
        told = Task(alice, attack).result()
    finally:
        stop.touch()
        swapper.result()
    assert all(not point.startswith("/home/bob") for point in points()), told
    take_all_away()
    stop.unlink()
    assert os.listdir(victim) == []


def exchange(first: Path, second: Path) -> None:
    at_cwd, flag = -100, 2
    with contextlib.suppress(OSError):
        libc.call("renameat2", at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), flag)


def test_the_mount_lies_where_the_descriptor_leads_wherever_the_path_does(alice: Person, lower: Path) -> None:
    before, after = folder(ROOT / "before", alice), ROOT / "after"

    def work() -> Answer:
        be_seen()
        folders = [client.open_folder(lower), client.open_folder(before)]
        before.rename(after)
        before.symlink_to("/etc")
        return raw_and_closed(request(KEY.signature), folders)

    answer = Task(alice, work).result()
    assert answer == (0, str(after)), answer
    assert points() == [str(after)]
    take_all_away()
    before.unlink()
    after.rmdir()


def raw_and_closed(data: bytes, folders: list[int]) -> Answer:
    with connect(SOCKET, frozenset({0})) as connection:
        socket.send_fds(connection, [data], folders)
        for fd in folders:
            os.close(fd)
        connection.shutdown(socket.SHUT_WR)
        return reply_of(connection)


def test_a_mount_of_roots_is_not_taken_away_by_swapping_the_folders_above(alice: Person, lower: Path) -> None:
    theirs = folder(Path("/srv/theirs"), alice)
    point = folder(theirs / "private", alice)
    libc.call("mount", b"tmpfs", os.fsencode(point), b"tmpfs", 0, None)
    nest = folder(ROOT / "away", alice)
    upper = folder(nest / "private", alice)
    (ROOT / "away-link").symlink_to(theirs)
    stop = ROOT / "stop"

    def swap() -> None:
        while not stop.exists():
            exchange(nest, ROOT / "away-link")

    def attack() -> list[Answer]:
        be_seen()
        told = []
        wanted = MountRequest(MOUNT, "private", (KEY.signature,))
        for _ in range(8):
            with contextlib.suppress(OSError):
                told.append(asked(lambda: client.ask_mount(wanted, lower, upper)))
            with contextlib.suppress(OSError):
                told.append(asked(lambda: client.ask_unmount("private", upper)))
        return told

    swapper = Task(alice, swap)
    try:
        told = Task(alice, attack).result()
    finally:
        stop.touch()
        swapper.result()
        stop.unlink()
        is_there = point.is_mount()
        libc.call("umount2", os.fsencode(point), 2)
    assert is_there, told


# --- namespaces ----------------------------------------------------------------------------------------------------


def from_namespaces(flags: int, who: Person, lower: Path, upper: Path) -> Answer:
    """A request of a process that has made namespaces, and opened the folders in them."""

    def work() -> Answer:
        unshare(flags)
        be_seen()
        return raw(request(KEY.signature), [client.open_folder(lower), client.open_folder(upper)])

    return Task(who, work).result()


def test_a_mount_namespace_of_ones_own_is_refused(alice: Person, lower: Path, upper: Path) -> None:
    refused(from_namespaces(NEW_USER | NEW_MOUNTS, alice, lower, upper), "namespace")
    assert made() == []


def test_a_user_namespace_of_ones_own_is_refused(alice: Person, lower: Path, upper: Path) -> None:
    refused(from_namespaces(NEW_USER, alice, lower, upper), "user namespace")
    assert made() == []


def test_in_a_mount_namespace_of_roots_the_mount_is_there_and_nowhere_else(
    alice: Person, lower: Path, upper: Path
) -> None:
    """As a service with PrivateMounts has one."""

    def work() -> list[str]:
        unshare(NEW_MOUNTS)
        libc.call("mount", b"none", b"/", None, 1 << 18 | 1 << 14, None)  # MS_PRIVATE | MS_REC
        answer = ask(alice, KEY.signature, lower, upper)
        return [answer.text, *points()]

    assert Task(person("root"), work).result() == [str(upper), str(upper)]
    assert made() == []


def test_descriptors_of_another_mount_namespace_are_refused(alice: Person, lower: Path, upper: Path) -> None:
    def work() -> Answer:
        folders = [client.open_folder(lower), client.open_folder(upper)]
        unshare(NEW_MOUNTS)

        def send() -> Answer:
            be_seen()
            return raw(request(KEY.signature), folders)

        return Task(alice, send).result()

    refused(Task(person("root"), work).result(), "is not in the mount namespace of the process that asked")


def test_in_a_chroot_the_mount_lies_on_the_folder_and_on_nothing_of_that_name(
    alice: Person, lower: Path, upper: Path
) -> None:
    """The cell has the socket, and folders of the same names, which belong to root."""
    cell = Path("/srv/cell")
    inside = cell / "run/upcall"
    inside.mkdir(parents=True)
    for path in (lower, upper):
        (cell / path.relative_to("/")).mkdir(parents=True)
    libc.call("mount", b"/run/upcall", os.fsencode(inside), None, 4096, None)  # MS_BIND

    def work() -> Answer:
        folders = [client.open_folder(lower), client.open_folder(upper)]
        os.chroot(cell)
        os.setresgid(alice.gid, alice.gid, alice.gid)
        os.setresuid(alice.uid, alice.uid, alice.uid)
        be_seen()
        return raw_and_closed(request(KEY.signature), folders)

    try:
        answer = Task(person("root"), work).result()
    finally:
        libc.call("umount2", os.fsencode(inside), 2)
    assert answer == (0, str(upper)), answer
    assert points() == [str(upper)]


def test_a_connection_that_root_has_made_is_refused(alice: Person, lower: Path, upper: Path) -> None:
    def work() -> Answer:
        folders = [client.open_folder(lower), client.open_folder(upper)]
        connection = connect(SOCKET, frozenset({0}))

        def send() -> Answer:
            be_seen()
            socket.send_fds(connection, [request(KEY.signature)], folders)
            connection.shutdown(socket.SHUT_WR)
            return reply_of(connection)

        return Task(alice, send).result()

    answer = Task(person("root"), work).result()
    assert answer.status == os.EX_NOPERM, answer
    assert made() == []


# --- who asks ------------------------------------------------------------------------------------------------------


def become(real: int, effective: int, saved: int) -> Callable[[], None]:
    return lambda: os.setresuid(real, effective, saved)


def test_a_set_user_id_program_is_refused_in_either_direction(
    alice: Person, bob: Person, lower: Path, upper: Path
) -> None:
    """(real, effective, saved) uids, and what is refused."""
    cases = {
        (alice.uid, 0, 0): "another process, or another user",
        (bob.uid, alice.uid, alice.uid): "another process, or another user",
        (alice.uid, alice.uid, 0): "set-user-ID",
    }
    for ids, text in cases.items():
        refused(ask(person("root"), KEY.signature, lower, upper, before=become(*ids)), text)
    assert made() == []


def test_a_set_group_id_program_is_refused(alice: Person, lower: Path, upper: Path) -> None:
    def become_both() -> None:
        os.setresgid(alice.gid, 5, alice.gid)
        os.setresuid(alice.uid, alice.uid, alice.uid)

    refused(ask(person("root"), KEY.signature, lower, upper, before=become_both), "set-user-ID")


def test_a_connection_that_another_process_has_made_is_refused(alice: Person, lower: Path, upper: Path) -> None:
    def work() -> Answer:
        connection = connect(SOCKET, frozenset({0}))
        folders = [client.open_folder(lower), client.open_folder(upper)]
        sender = os.fork()
        if sender == 0:
            socket.send_fds(connection, [request(KEY.signature)], folders)
            os._exit(0)
        os.waitpid(sender, 0)
        connection.shutdown(socket.SHUT_WR)
        return reply_of(connection)

    refused(Task(alice, work).result(), "by another process")


def test_root_is_refused(lower: Path, upper: Path) -> None:
    refused(ask(person("root"), KEY.signature, lower, upper), "root mounts without help", status=os.EX_USAGE)
    refused(ask_away(person("root"), upper), "umount(8)", status=os.EX_USAGE)


def test_a_process_that_dies_after_asking_gets_no_mount(
    serving: Task[None], alice: Person, lower: Path, upper: Path
) -> None:
    before = LOG.read_text().count("has ended")
    serving.send_signal(signal.SIGSTOP)
    try:

        def work() -> None:
            connection = connect(SOCKET, frozenset({0}))
            socket.send_fds(
                connection, [request(KEY.signature)], [client.open_folder(lower), client.open_folder(upper)]
            )
            os._exit(0)

        with contextlib.suppress(Exception):
            Task(alice, work).result()
    finally:
        serving.send_signal(signal.SIGCONT)
    wait_until(lambda: LOG.read_text().count("has ended") > before, "the source notices")
    assert made() == []


def test_a_peer_that_sends_nothing_delays_only_itself(alice: Person, bob: Person, lower: Path, upper: Path) -> None:
    def idle() -> Answer:
        return reply_of(connect(SOCKET, frozenset({0})))

    idler = Task(bob, idle)
    assert ask(alice, KEY.signature, lower, upper).status == 0
    refused(idler.result(), "no request has come", status=os.EX_USAGE)


def test_a_user_without_the_key_gets_no_mount(bob: Person) -> None:
    mine, over = folder(Path("/home/bob/lower"), bob), folder(Path("/home/bob/upper"), bob)
    refused(ask(bob, KEY.signature, mine, over), "auth token", status=os.EX_UNAVAILABLE)


# --- requests ------------------------------------------------------------------------------------------------------


NAMES = [
    b"a,ecryptfs_passthrough",
    b"../../etc",
    b"a b",
    b"a\nb",
    b"-o",
    b".",
    b"a/b",
    b"x" * 65,
    b"",
    b"a\0b",
    b"\xff",
]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_an_option_cannot_be_smuggled_in_a_name(alice: Person, lower: Path, upper: Path, name: bytes) -> None:
    good = request(KEY.signature)
    data = good[:5] + bytes([len(name)]) + name + good[6 + len("private") :]

    def work() -> Answer:
        be_seen()
        return raw(data, [client.open_folder(lower), client.open_folder(upper)])

    refused(Task(alice, work).result(), "malformed", status=os.EX_USAGE)
    assert made() == []


def test_other_descriptors_than_those_of_two_folders_are_refused(alice: Person, lower: Path, upper: Path) -> None:
    good = request(KEY.signature)

    def work() -> list[Answer]:
        be_seen()
        file = upper / "file"
        file.touch()
        paths = [client.open_folder(lower), client.open_folder(upper)]
        readable = os.open(lower, os.O_RDONLY | os.O_DIRECTORY)
        ours, _ = socket.socketpair()
        of_file = os.open(file, os.O_PATH)
        told = [
            raw(good, []),
            raw(good, paths[:1]),
            raw(good, [*paths, paths[0]]),
            raw(good, [paths[0], readable]),
            raw(good, [ours.fileno(), paths[1]]),
            raw(good, [paths[0], of_file]),
            raw(good + b"x", paths),
            raw(b"x" * 500, paths),
        ]
        file.unlink()
        return told

    told = Task(alice, work).result()
    assert all(answer.status in (os.EX_USAGE, os.EX_NOPERM) for answer in told), told
    assert made() == []


def test_too_many_requests_are_refused_and_another_user_is_not_delayed(
    alice: Person, bob: Person, lower: Path, upper: Path
) -> None:
    def flood() -> bool:
        be_seen()
        return any("too many requests: wait a few seconds" in raw(b"x", []).text for _ in range(1000))

    assert all(task.result() for task in [Task(bob, flood) for _ in range(4)])
    assert ask(alice, KEY.signature, lower, upper).status == 0


# --- filesystems that hang -----------------------------------------------------------------------------------------


@pytest.fixture
def hanging(alice: Person) -> Iterator[Path]:
    """A FUSE of alice's own that answers nothing."""
    point = folder(ROOT / "fuse", alice)
    with contextlib.suppress(OSError):
        os.system("modprobe fuse")
    if not Path("/dev/fuse").exists():
        pytest.skip("this kernel has no FUSE")
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id={alice.uid},group_id={alice.gid},allow_other".encode()
    libc.call("mount", b"hanging", os.fsencode(point), b"fuse", 0, ctypes.c_char_p(options))
    yield point
    libc.call("umount2", os.fsencode(point), 2)
    os.close(device)  # aborts what waits for it


@pytest.mark.parametrize("which", ["lower", "upper"])
def test_a_filesystem_of_the_users_own_that_hangs_is_not_asked(
    hanging: Path, alice: Person, lower: Path, upper: Path, which: str
) -> None:
    pair = (hanging, upper) if which == "lower" else (lower, hanging)
    refused(ask(alice, KEY.signature, *pair), f"the {which} folder is on fuse")


def test_what_works_on_lower_files_sees_that_they_are_mounted(alice: Person, lower: Path, upper: Path) -> None:
    assert ask(alice, KEY.signature, lower, upper).status == 0
    (lower / "below").mkdir(exist_ok=True)
    lowers = lower_folders(mounts())
    above = []
    for path in (lower / "below", upper, ROOT):
        top = os.open(path, os.O_PATH)
        above.append(mount_above(top, lowers))
        os.close(top)
    assert above[0] is not None and (above[0][0].point, above[0][1]) == (str(upper), lower)
    assert above[1:] == [None, None]
    (lower / "below").rmdir()


def test_a_filesystem_that_hangs_above_a_folder_is_not_asked(alice: Person, lower: Path) -> None:
    """It was mounted after the folder below was opened."""
    above = folder(ROOT / "above-all", alice)
    inner = folder(above / "inner", alice)
    go, ready = ROOT / "go", ROOT / "ready"

    def work() -> Answer:
        folders = [client.open_folder(lower), client.open_folder(inner)]
        ready.touch()
        wait_until(go.exists, "it is mounted")
        be_seen()
        return raw_and_closed(request(KEY.signature), folders)

    task = Task(alice, work)
    wait_until(lambda: ready.exists() or task.ended, "alice has opened the folders")
    with contextlib.suppress(OSError):
        os.system("modprobe fuse")
    if not Path("/dev/fuse").exists():
        go.touch()
        pytest.skip("this kernel has no FUSE")
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id={alice.uid},group_id={alice.gid},allow_other".encode()
    libc.call("mount", b"hanging", os.fsencode(above), b"fuse", 0, ctypes.c_char_p(options))
    try:
        go.touch()
        answer = task.result()
    finally:
        libc.call("umount2", os.fsencode(above), 2)
        os.close(device)
        for path in (go, ready):
            path.unlink(missing_ok=True)
    refused(answer, "a folder above is on fuse", status=os.EX_OSERR)


# --- taking away ---------------------------------------------------------------------------------------------------


def test_another_users_mount_cannot_be_taken_away(alice: Person, bob: Person, lower: Path, upper: Path) -> None:
    assert ask(alice, KEY.signature, lower, upper).status == 0
    ROOT.chmod(0o755)
    try:
        refused(ask_away(bob, upper), "was mounted for uid 5001, not for you")
    finally:
        ROOT.chmod(0o700)
    refused(ask_away(alice, upper, "other"), "is the mount private", status=os.EX_USAGE)
    assert points() == [str(upper)]


def test_a_mount_that_upcall_has_not_made_cannot_be_taken_away(alice: Person, lower: Path, upper: Path) -> None:
    mount(alice, lower, upper, KEY.signature)
    refused(ask_away(alice, upper), "is not a mount that `upcall mount` has made")
    refused(ask_away(alice, ROOT), "is not a mount that `upcall mount` has made")
    assert points() == [str(upper)]


def test_a_mount_that_is_in_use_stays_unless_asked_otherwise(alice: Person, lower: Path, upper: Path) -> None:
    assert ask(alice, KEY.signature, lower, upper).status == 0
    held = os.open(upper, os.O_PATH)
    refused(ask_away(alice, upper), "is in use", "--lazy private", status=os.EX_TEMPFAIL)
    assert points() == [str(upper)]
    assert ask_away(alice, upper, lazy=True).status == 0
    os.close(held)
    assert made() == []


@pytest.mark.parametrize("lazy", [False, True])
def test_what_root_has_mounted_on_a_users_mount_stays(alice: Person, lower: Path, upper: Path, lazy: bool) -> None:
    """The user has kept a descriptor of her mount, which root's covers now."""
    assert ask(alice, KEY.signature, lower, upper).status == 0
    ready, go = ROOT / "ready", ROOT / "go"

    def work() -> Answer:
        fd = client.open_folder(upper)
        ready.touch()
        wait_until(go.exists, "root's mount")
        be_seen()
        return raw_and_closed(pack_request(MountRequest(UNMOUNT, "private", key_bytes=0, lazy=lazy)), [fd])

    task = Task(alice, work)
    wait_until(ready.exists, "the descriptor")
    libc.call("mount", b"tmpfs", os.fsencode(upper), b"tmpfs", 0, b"mode=0755")
    go.touch()
    try:
        refused(task.result(), "something else is mounted on it", status=os.EX_TEMPFAIL)
        assert [one.type for one in mounts() if one.point == str(upper)] == ["ecryptfs", "tmpfs"]
    finally:
        libc.call("umount2", os.fsencode(upper), 2)
        ready.unlink()
        go.unlink()


def test_a_mount_of_roots_whose_mount_point_is_exchanged_with_a_users_stays(alice: Person, lower: Path) -> None:
    """In a mount namespace that is older than the mounts, their mount points can be renamed."""
    nest = folder(ROOT / "exchanged", alice)
    point, roots = folder(nest / "private", alice), folder(nest / "roots", alice)
    libc.call("mount", b"tmpfs", os.fsencode(roots), b"tmpfs", 0, b"mode=0755")
    device = roots.stat().st_dev
    ready, stop = ROOT / "ready", ROOT / "stop"

    def swap() -> None:
        unshare(NEW_USER | NEW_MOUNTS)
        ready.touch()
        while not stop.exists():
            exchange(nest / "private", nest / "roots")

    def attack() -> list[Answer]:
        be_seen()
        wanted, told = MountRequest(MOUNT, "private", (KEY.signature,)), []
        for _ in range(20):
            with contextlib.suppress(OSError):
                told.append(asked(lambda: client.ask_mount(wanted, lower, point)))
            for path in (point, roots):
                with contextlib.suppress(OSError):
                    told.append(asked(lambda path=path: client.ask_unmount("private", path)))  # type: ignore[misc]
        return told

    swapper = Task(alice, swap)
    try:
        wait_until(lambda: ready.exists() or swapper.ended, "the namespace")
        told = Task(alice, attack).result()
    finally:
        stop.touch()
        swapper.result()
        is_there = any(one.device == device for one in mounts())
        take_all_away()
        for path in (point, roots):
            with contextlib.suppress(OSError):
                libc.call("umount2", os.fsencode(path), 2)
        ready.unlink()
        stop.unlink()
    assert is_there, told


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_a_mount_of_roots_over_or_in_ones_own_is_not_taken_away(
    alice: Person, lower: Path, upper: Path, inside: bool, lazy: bool
) -> None:
    """alice keeps a descriptor of her own mount, which lies below."""
    assert ask(alice, KEY.signature, lower, upper).status == 0
    point = folder(upper / "inner", alice) if inside else upper
    go, ready = ROOT / "go", ROOT / "ready"

    def work() -> Answer:
        folders = [client.open_folder(upper)]
        ready.touch()
        wait_until(go.exists, "root has mounted")
        be_seen()
        return raw_and_closed(unmount_request(lazy), folders)

    task = Task(alice, work)
    wait_until(lambda: ready.exists() or task.ended, "alice has a descriptor")
    libc.call("mount", b"tmpfs", os.fsencode(point), b"tmpfs", 0, b"mode=0755")
    try:
        go.touch()
        answer = task.result()
        types = [one.type for one in mounts() if one.point.startswith(str(upper))]
    finally:
        libc.call("umount2", os.fsencode(point), 2)
        for path in (go, ready):
            path.unlink(missing_ok=True)
    assert types == ["ecryptfs", "tmpfs"], answer
    refused(answer, f"{upper}: something else is mounted on it or in it", status=os.EX_TEMPFAIL)
    assert ask_away(alice, upper, lazy=lazy).status == 0


def unmount_request(lazy: bool = False) -> bytes:
    return pack_request(MountRequest(UNMOUNT, "private", key_bytes=0, lazy=lazy))


@pytest.mark.parametrize("lazy", [False, True])
def test_a_mount_of_roots_does_not_go_when_its_point_gets_the_name_of_ones_own(
    alice: Person, lower: Path, lazy: bool
) -> None:
    """In a mount namespace that was made before, mount points are ordinary folders, and a loop exchanges them."""
    nest = folder(ROOT / "points", alice)
    mine, roots = folder(nest / "mine", alice), folder(nest / "roots", alice)
    ready, go, stop = ROOT / "ready", ROOT / "go", ROOT / "stop"

    def swap() -> int:
        unshare(NEW_USER | NEW_MOUNTS)
        libc.call("mount", b"none", b"/", None, 1 << 18 | 1 << 14, None)  # MS_PRIVATE | MS_REC
        ready.touch()
        wait_until(go.exists, "all is mounted")
        done = 0
        while not stop.exists():
            for _ in range(100):
                libc.call("renameat2", -100, os.fsencode(mine), -100, os.fsencode(roots), 2)  # RENAME_EXCHANGE
                done += 1
        return done

    swapper = Task(alice, swap)
    device = 0
    try:
        wait_until(lambda: ready.exists() or swapper.ended, "the namespace")
        libc.call("mount", b"tmpfs", os.fsencode(roots), b"tmpfs", 0, b"mode=0755")
        device = os.stat(roots).st_dev
        assert ask(alice, KEY.signature, lower, mine).status == 0

        def attack() -> list[Answer]:
            be_seen()
            folders = [client.open_folder(mine)]
            go.touch()
            return [raw(unmount_request(lazy), folders) for _ in range(10)]

        told = Task(alice, attack).result()
    finally:
        go.touch()
        stop.touch()
        done = swapper.result()
        left = [one.device for one in mounts() if one.point.startswith(str(nest))]
        take_all_away()
        for one in list(mounts()):
            if one.device == device:
                libc.call("umount2", os.fsencode(one.point), 2)
        for path in (ready, go, stop):
            path.unlink(missing_ok=True)
    assert done and device in left, told


def test_a_mount_beside_those_of_root_is_taken_away(alice: Person, lower: Path, upper: Path) -> None:
    beside = folder(ROOT / "beside", alice)
    libc.call("mount", b"tmpfs", os.fsencode(beside), b"tmpfs", 0, b"mode=0755")
    try:
        assert ask(alice, KEY.signature, lower, upper).status == 0
        assert ask_away(alice, upper) == (0, str(upper))
        assert beside.is_mount()
    finally:
        libc.call("umount2", os.fsencode(beside), 2)


def test_a_user_cannot_end_the_child_that_has_attached_a_mount(
    serving: Task[None], alice: Person, lower: Path, upper: Path
) -> None:
    stop = ROOT / "stop"

    def hunt() -> list[int]:
        """Ends all children, as soon as something is mounted; returns those that it could."""
        children = Path(f"/proc/{serving.pid}/task/{serving.pid}/children")
        hit = []
        while not stop.exists():
            for kid in map(int, children.read_text().split() if points() else ()):
                with contextlib.suppress(OSError):
                    os.kill(kid, signal.SIGKILL)
                    hit.append(kid)
        return hit

    hunter = Task(alice, hunt)
    answers = []
    try:
        for _ in range(4):
            answers.append(ask(alice, KEY.signature, lower, upper))
            take_all_away()
    finally:
        stop.touch()
        hit = hunter.result()
        stop.unlink()
    assert not hit, answers
    assert [answer.status for answer in answers] == [0] * 4, answers


def test_a_configuration_that_is_wrong_allows_nobody(alice: Person, lower: Path, upper: Path) -> None:
    before = CONFIG.read_text()
    CONFIG.write_text("[mount]\nusers = 5\n")
    try:
        refused(ask(alice, KEY.signature, lower, upper), "upcall config check", status=os.EX_CONFIG)
    finally:
        CONFIG.write_text(before)


def test_the_user_keyring_of_the_caller_is_where_the_key_is_looked_for(
    alice: Person, lower: Path, upper: Path
) -> None:
    """A caller whose session keyring is another's finds its own user keyring's keys, and no others."""

    def strange_session() -> None:
        keyring.join_session_and_link_user_keyring()

    assert ask(alice, KEY.signature, lower, upper, before=strange_session).status == 0

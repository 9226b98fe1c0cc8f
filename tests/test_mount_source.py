"""The source that mounts for users, by real sockets and descriptors; what the kernel would do is played."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.played_mounting import DEADLINE
from upcall.kernel.local import connect
from upcall.protocols.ecryptfs.mounting.client import (
    SOCKET,
    MountRefused,
    NoMountSource,
    ask_mount,
    ask_unmount,
    open_folder,
)
from upcall.protocols.ecryptfs.mounting.messages import MAX_REPLY, UNMOUNT, MountRequest, pack_request, take_reply
from upcall.testing.processes import PATIENCE, Started, in_child, until

SIGNATURE = "0123456789abcdef"
HERE = Path(__file__).parent.parent
USER = os.geteuid() or 65534  # root is refused: it mounts without help


@pytest.fixture
def source(folder: Path) -> Iterator[Started]:
    with Started(
        ["-m", "tests.played_mounting", str(folder)], folder.parent / "log", {"PYTHONPATH": str(HERE)}
    ) as made:
        made.logged("ready")
        yield made


@pytest.fixture
def place(source: Started, folder: Path) -> Path:
    return folder


def pair(folder: Path, name: str = "private") -> tuple[Path, Path]:
    found = folder.parent / f"lower-{name}", folder.parent / f"upper-{name}"
    for one in found:
        one.mkdir(mode=0o700, exist_ok=True)
        os.chown(one, USER, -1)
    return found


def as_user(work: Callable[[], str], place: Path) -> tuple[int, str]:
    """Asks as USER. Returns 0 and the path, or the status and text of the refusal."""

    def told() -> tuple[int, str]:
        try:
            return 0, work()
        except MountRefused as refused:
            return refused.status, str(refused)

    status, text = in_child(told, USER if os.geteuid() == 0 else None)
    return status, text


def mount(place: Path, name: str = "private") -> tuple[int, str]:
    lower, upper = pair(place, name)
    # A broker's folder that is no system's: root is trusted there, and the user.
    return as_user(lambda: ask_mount(MountRequest(1, name, (SIGNATURE,)), lower, upper, place), place)


def unmount(place: Path, upper: Path, lazy: bool = False) -> tuple[int, str]:
    return as_user(lambda: ask_unmount("private", upper, lazy, place), place)


def test_a_mount_is_made_and_taken_away(place: Path, source: Started) -> None:
    _, upper = pair(place)
    assert mount(place) == (0, str(upper))
    source.logged(f"mounted uid={USER} name=private point={upper}")
    assert mount(place)[0] == os.EX_TEMPFAIL
    assert unmount(place, upper) == (0, str(upper))
    source.logged("unmounted")
    assert mount(place) == (0, str(upper))


def test_a_mount_in_use_is_taken_away_only_if_asked_for(place: Path) -> None:
    _, upper = pair(place)
    assert mount(place)[0] == 0
    (upper / "busy").touch()
    status, text = unmount(place, upper)
    assert status == os.EX_TEMPFAIL and "is in use" in text and "--lazy private" in text
    assert unmount(place, upper, lazy=True) == (0, str(upper))


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("where", ["", "/inner"])
def test_a_mount_with_another_over_it_is_not_taken_away(place: Path, where: str, lazy: bool) -> None:
    _, upper = pair(place)
    assert mount(place)[0] == 0
    (place / "stacked").write_text(f"{upper}{where}")
    status, text = unmount(place, upper, lazy)
    assert (status, text) == (os.EX_TEMPFAIL, f"{upper}: something else is mounted on it or in it: unmount that first")
    (place / "stacked").unlink()
    assert unmount(place, upper, lazy) == (0, str(upper))


def test_a_mount_that_another_is_just_put_over_is_not_taken_away(place: Path) -> None:
    _, upper = pair(place)
    assert mount(place)[0] == 0
    (upper / "stacked").touch()
    status, text = unmount(place, upper)
    assert status == os.EX_TEMPFAIL and "mounts have changed meanwhile" in text
    (upper / "stacked").unlink()
    (place / "stacked").unlink()
    assert unmount(place, upper) == (0, str(upper))


def test_folders_are_checked_again_after_the_mount_was_made(place: Path) -> None:
    assert "is not empty" in mount(place, "moved")[1]
    assert not (place / "mounts.json").exists()


def test_a_mount_without_the_options_is_not_attached(place: Path) -> None:
    status, text = mount(place, "weak")
    assert status == os.EX_OSERR and "has not set all of nodev, nosuid" in text
    assert not (place / "mounts.json").exists()


def test_the_number_of_mounts_is_limited(place: Path) -> None:
    assert [mount(place, f"m{number}")[0] for number in range(4)] == [0, 0, 0, os.EX_TEMPFAIL]
    assert "you have 3 mounts, and may have 3" in mount(place, "m3")[1]


def test_a_request_that_hangs_is_answered_at_its_deadline_and_the_next_one_served(place: Path) -> None:
    status, text = mount(place, "hang")
    assert status == os.EX_TEMPFAIL and f"not done within {DEADLINE:g} s" in text
    until(lambda: mount(place)[0] == 0, "the next one")


def test_a_child_that_is_killed_is_answered_for(place: Path, source: Started) -> None:
    assert "the process that mounts has failed (-9)" in mount(place, "die")[1]
    source.logged("mount-child-failed")
    assert mount(place)[0] == 0


def test_the_kernels_refusal_has_a_remedy(place: Path) -> None:
    status, text = mount(place, "fail")
    assert status == os.EX_UNAVAILABLE and "`upcall key add`" in text


def test_a_folder_that_is_not_empty_is_refused(place: Path) -> None:
    _, upper = pair(place)
    (upper / "file").touch()
    assert "is not empty" in mount(place)[1]


@pytest.mark.parametrize("which", [0, 1])
def test_a_folder_that_others_can_write_to_is_refused(place: Path, which: int) -> None:
    pair(place)[which].chmod(0o720)
    status, text = mount(place)
    assert status == os.EX_NOPERM and "mode 0720" in text and "chmod go-w" in text


def test_a_long_path_of_many_bytes_in_a_reason_harms_nothing(place: Path, source: Started) -> None:
    for name in (b"\xf0\x9f\x94\x92" * 60, b"\xff" * 250, b"\x1b[31m" * 40):
        upper = Path(os.fsdecode(os.fsencode(place.parent) + b"/" + name))
        upper.mkdir(mode=0o700)
        os.chown(upper, USER, -1)
        inner = upper / os.fsdecode(name)
        inner.mkdir()
        inner.chmod(0o720)
        os.chown(inner, USER, -1)
        lower, _ = pair(place)
        asked = MountRequest(1, "private", (SIGNATURE,))
        status, text = as_user(lambda: ask_mount(asked, lower, inner, place), place)  # noqa: B023
        assert status == os.EX_NOPERM and text.isprintable() and "mode 0720" in text
    source.logged("mount-refused")
    assert mount(place)[0] == 0


def test_requests_are_rate_limited_and_the_limit_passes(place: Path) -> None:
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connect(place / SOCKET, frozenset({os.geteuid()}))) for _ in range(60)]
        connections[-1].settimeout(PATIENCE)
        told = take_reply(connections[-1].recv(MAX_REPLY)).text
    assert "too many requests: wait" in told
    pair(place)
    until(lambda: mount(place)[0] == 0, "there is credit again")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is refused")
def test_root_is_told_to_mount_without_help(place: Path) -> None:
    lower, upper = pair(place)
    for one in (lower, upper):
        os.chown(one, 0, -1)
    with pytest.raises(MountRefused, match="root mounts without help"):
        ask_mount(MountRequest(1, "private", (SIGNATURE,)), lower, upper, place)


def raw(place: Path, data: bytes, *descriptors: int, whole: bool = True) -> tuple[int, str]:
    with connect(place / SOCKET, frozenset({os.geteuid()})) as connection:
        connection.settimeout(PATIENCE)
        socket.send_fds(connection, [data], list(descriptors))
        if whole:
            connection.shutdown(socket.SHUT_WR)
        return tuple(take_reply(connection.recv(MAX_REPLY)))  # type: ignore[return-value]


def test_a_malformed_request_is_refused(place: Path) -> None:
    for data in (b"x", b"\x02" * 20, b"x" * 500):
        status, text = raw(place, data)
        assert status == os.EX_USAGE and ("malformed" in text or "longer" in text)


def test_wrong_descriptors_are_refused(place: Path, folder: Path) -> None:
    data = pack_request(MountRequest(UNMOUNT, "private", (), 0))
    readable, path = os.open(folder, os.O_RDONLY), open_folder(folder)
    for given in ((), (path, path), (path, path, path), (readable,), (0,)):
        status, _ = raw(place, data, *given)
        assert status == os.EX_USAGE


def test_a_request_without_an_end_is_refused_in_time(place: Path, folder: Path) -> None:
    data = pack_request(MountRequest(UNMOUNT, "private", (), 0))
    status, text = raw(place, data, open_folder(folder), whole=False)
    assert status in (os.EX_USAGE, os.EX_TEMPFAIL), text


def test_a_message_of_another_process_is_refused(place: Path, folder: Path) -> None:
    data = pack_request(MountRequest(UNMOUNT, "private", (), 0))
    with connect(place / SOCKET, frozenset({os.geteuid()})) as connection:
        path = open_folder(folder)
        if (sender := os.fork()) == 0:
            socket.send_fds(connection, [data], [path])
            os._exit(0)
        os.waitpid(sender, 0)
        connection.shutdown(socket.SHUT_WR)
        status, text = take_reply(connection.recv(MAX_REPLY))
    assert status == os.EX_NOPERM and "by another process" in text


def test_what_is_no_mount_of_ours_cannot_be_taken_away(place: Path, folder: Path) -> None:
    status, text = unmount(place, folder)
    assert status == os.EX_NOPERM and "is not a mount that `upcall mount` has made" in text


def test_a_peer_that_ends_in_the_middle_harms_nobody(place: Path, folder: Path, source: Started) -> None:
    for _ in range(3):
        connection = connect(place / SOCKET, frozenset({os.geteuid()}))
        connection.send(b"x")
        connection.close()
    assert raw(place, b"x")[0] == os.EX_USAGE
    source.signal(signal.SIGTERM)
    assert source.wait() == 0
    assert not (place / SOCKET).exists()


def test_without_a_source_the_client_says_so(folder: Path) -> None:
    folder.mkdir()
    with pytest.raises(NoMountSource, match=r"mount\.sock"):
        ask_unmount("private", folder, folder=folder)


# --- opening folders -----------------------------------------------------------------------------------------------


def test_no_component_of_a_path_may_be_a_link(tmp_path: Path) -> None:
    real = tmp_path / "real" / "inner"
    real.mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    os.close(open_folder(real))
    for path, at in ((tmp_path / "link", "link"), (tmp_path / "link" / "inner", "link")):
        with pytest.raises(OSError, match="is a symbolic link") as found:
            open_folder(path)
        assert found.value.filename == str(tmp_path / at)


def test_what_is_missing_or_no_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError) as found:
        open_folder(tmp_path / "missing" / "x")
    assert found.value.filename == str(tmp_path / "missing")
    with pytest.raises(NotADirectoryError):
        open_folder(tmp_path / "file")

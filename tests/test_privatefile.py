"""Private files: reading refuses what others can reach, writing never replaces a file."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from upcall.keys.private_file import fingerprint, read_private, write_new


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.touch(0o600)
    path.write_bytes(b"content")
    return path


def test_a_private_file_is_read_with_its_fingerprint(file: Path) -> None:
    data, found = read_private(file, 7)
    assert data == b"content"
    assert found == fingerprint(file.stat())


def refused(path: Path, code: int, limit: int = 100) -> None:
    with pytest.raises(OSError, match=path.name) as caught:
        read_private(path, limit)
    assert caught.value.errno == code


def test_a_file_longer_than_the_limit_is_refused(file: Path) -> None:
    refused(file, errno.EFBIG, 6)


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o640, 0o620])
def test_a_file_that_others_can_read_or_write_is_refused(file: Path, mode: int) -> None:
    file.chmod(mode)
    refused(file, errno.EPERM)


def test_missing_files_folders_and_fifos_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none", errno.ENOENT)
    (tmp_path / "folder").mkdir(0o700)
    refused(tmp_path / "folder", errno.EISDIR)
    os.mkfifo(tmp_path / "fifo", 0o600)
    refused(tmp_path / "fifo", errno.EINVAL)


def test_a_file_of_another_user_is_refused(file: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give files away")
    os.chown(file, 12345, -1)
    refused(file, errno.EPERM)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_a_new_file_has_mode_0600_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_new(tmp_path / "new", b"content" * 1000)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o600
    assert (tmp_path / "new").read_bytes() == b"content" * 1000
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_writing_never_replaces_a_file_or_a_link(file: Path) -> None:
    link = file.with_name("link")
    link.symlink_to("nowhere")
    for path in (file, link):
        with pytest.raises(FileExistsError, match=path.name):
            write_new(path, b"other")
    assert file.read_bytes() == b"content"
    assert sorted(path.name for path in file.parent.iterdir()) == ["file", "link"]


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_new(tmp_path / "new", b"content")
    assert not list(tmp_path.iterdir())

"""Which filesystems are asked for quotas, and where; what the kernel answers is shown in tests/kernel."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from upcall.kernel import quotactl
from upcall.kernel.mounts import Mount

DISK, OTHER = os.makedev(8, 1), os.makedev(8, 2)


def mount(point: str, kind: str = "ext4", device: int = DISK, root: str = "/") -> Mount:
    return Mount(device, root, point, kind, "/dev/sda1", frozenset())


class Played:
    """An open filesystem."""

    def __init__(self, kinds: tuple[int, ...]) -> None:
        self.kinds = kinds

    def enforced(self) -> tuple[int, ...]:
        if not self.kinds:
            raise OSError(errno.ESRCH, "quotas are off")
        return self.kinds

    def __enter__(self) -> Played:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The mount points that were opened."""
    found: list[str] = []

    def opened(one: Mount) -> Played:
        found.append(one.point)
        if one.point == "/hidden":
            raise OSError(errno.ESTALE, "something else is mounted above it")
        return Played(() if one.point == "/off" else (0, 1))

    monkeypatch.setattr(quotactl, "opened", opened)
    return found


def test_network_and_pseudo_filesystems_are_not_opened(touched: list[str]) -> None:
    others = ("nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "fuse", "fuse.sshfs", "autofs", "overlay", "afs", "proc")
    table = [mount(f"/{kind}", kind, os.makedev(0, number)) for number, kind in enumerate(others)]
    assert quotactl.with_quotas([*table, mount("/home")]) == {mount("/home"): (0, 1)}
    assert touched == ["/home"]


def test_each_filesystem_is_asked_once_at_its_root_if_mounted(touched: list[str]) -> None:
    part, whole, again = mount("/part", root="/folder"), mount("/whole"), mount("/again")
    other = mount("/other", "xfs", OTHER, "/container")
    assert list(quotactl.with_quotas([part, whole, again, other])) == [whole, other]
    assert touched == ["/whole", "/other"]


@pytest.mark.parametrize("first", ["/hidden", "/off"])
def test_a_filesystem_hidden_at_one_mount_is_asked_at_another(touched: list[str], first: str) -> None:
    part = mount("/part", root="/folder")
    assert list(quotactl.with_quotas([mount(first), part])) == [part]


def test_another_filesystem_mounted_above_is_refused_as_stale(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="something else is mounted above it") as caught:
        quotactl.opened(mount(str(tmp_path), device=os.makedev(250, 77)))
    assert caught.value.errno == errno.ESTALE
    with quotactl.opened(mount(str(tmp_path), device=tmp_path.stat().st_dev)) as found:
        fd = found.fd
        assert found.number() == tmp_path.stat().st_dev
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


class Libc:
    """Says what the kernel says of a read-only mount."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def syscall(self, *_: object) -> int:
        self.asked.append("descriptor")
        raise OSError(errno.EROFS, "read-only")

    def call(self, name: str, _: object, device: bytes, *__: object) -> int:
        assert name == "quotactl"
        self.asked.append(device.decode())
        return 0


@pytest.mark.skipif(not quotactl._QUOTACTL_FD, reason="quotactl by descriptor has another number here")
def test_a_read_only_mount_is_asked_by_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = Libc()
    monkeypatch.setattr(quotactl, "libc", libc)
    with quotactl.Filesystem("/", "/dev/sda1") as found:
        assert found.get(quotactl.USER, 5001).id == 5001
    assert libc.asked == ["descriptor", "/dev/sda1"]

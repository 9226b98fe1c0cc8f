"""The lab's kernel and busybox, kept in the user's cache folder, and the initramfs made from them.

    ~/.cache/upcall/lab/PACKAGE_VERSION/   vmlinuz  busybox  release  modules/
    ~/.cache/upcall/lab/current            a link to the newest of these

A folder is made under another name and renamed when it is complete, so that two first runs at once disturb
nobody. Whoever uses one holds a shared lock on it; a fetch removes older ones that nobody holds."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import cpio, packages
from .errors import LabUnavailable
from .modules import load_order
from .packages import Say

BUSYBOX_PACKAGE = "busybox-static"
NEEDED_BYTES = 1 << 30  # while it is unpacked; about 400 MB stay

# What the guest needs before it sees the host's files, and what every command finds loaded.
MODULES = ("virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay", "ecb", "ecryptfs")


@dataclass(frozen=True)
class Image:
    """A complete folder in the cache; `release` is what `uname -r` says in the guest."""

    folder: Path
    release: str

    @property
    def kernel(self) -> Path:
        return self.folder / "vmlinuz"

    @property
    def busybox(self) -> Path:
        return self.folder / "busybox"

    @property
    def modules(self) -> Path:
        """What belongs at /lib/modules/RELEASE."""
        return self.folder / "modules"

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Keeps a later fetch from removing the folder."""
        with (self.folder / "release").open("rb") as held:
            fcntl.flock(held, fcntl.LOCK_SH)
            yield


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "upcall" / "lab"


def cached() -> Image | None:
    """The image that a run would use, or None before the first fetch."""
    try:
        folder = (cache_folder() / "current").resolve(strict=True)
        return Image(folder, (folder / "release").read_text().strip())
    except OSError:
        return None


def ensure(say: Say) -> Image:
    """The cached image, fetched first if there is none."""
    return cached() or fetch(say)


def fetch(say: Say) -> Image:
    """Downloads the newest kernel that apt knows, unless the cache has it, and makes it the current one.

    Raises LabUnavailable with the remedy when it cannot."""
    packages.require_tools()
    kernel, version = _kernel_to_fetch(say)
    cache = cache_folder()
    complete = cache / f"{kernel}_{version.replace(':', '%3a')}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not complete.is_dir():
            with tempfile.TemporaryDirectory(dir=cache, prefix=".making-") as temporary:
                _put_in_place(_make(kernel, Path(temporary), say), complete)
        _point_current_at(complete)
    except OSError as error:
        raise LabUnavailable(f"cannot fill the cache folder {cache}: {error.strerror}") from error
    _remove_older(complete)
    return Image(complete, (complete / "release").read_text().strip())


def _kernel_to_fetch(say: Say) -> tuple[str, str]:
    def look() -> tuple[str | None, str | None]:
        kernel = packages.kernel_package()
        return kernel, packages.candidate(kernel) if kernel and packages.candidate(BUSYBOX_PACKAGE) else None

    kernel, version = look()
    if kernel is None or version is None:
        packages.update_lists(say)
        kernel, version = look()
    if kernel is None or version is None:
        raise LabUnavailable(
            f"apt knows no {packages.KERNEL_META_PACKAGE} or no {BUSYBOX_PACKAGE}: "
            "add Debian's main archive to apt's sources and run `apt-get update`"
        )
    return kernel, version


def _make(kernel: str, temporary: Path, say: Say) -> Path:
    """Downloads and unpacks into `temporary`; gives the folder that is ready to be renamed."""
    unpacked, made = temporary / "unpacked", temporary / "made"
    made.mkdir()
    for package in packages.download([kernel, BUSYBOX_PACKAGE], temporary, say):
        packages.unpack(package, unpacked)
    say("indexing the kernel's modules")
    vmlinuz = next((unpacked / "boot").glob("vmlinuz-*"))
    release = vmlinuz.name.removeprefix("vmlinuz-")
    root = unpacked if (unpacked / "lib").exists() else unpacked / "usr"  # newer packages have all below /usr
    busybox = next(path for path in (unpacked / "bin/busybox", unpacked / "usr/bin/busybox") if path.exists())
    _index(busybox, root, release)
    vmlinuz.rename(made / "vmlinuz")
    busybox.rename(made / "busybox")
    (root / "lib/modules" / release).rename(made / "modules")
    (made / "release").write_text(release + "\n")
    made.chmod(0o755)
    return made


def _index(busybox: Path, root: Path, release: str) -> None:
    """Debian's package leaves modules.dep and its like to the installation; busybox's depmod needs no
    root."""
    done = subprocess.run([str(busybox), "depmod", "-b", str(root), release], capture_output=True, text=True)
    if done.returncode != 0 or not (root / "lib/modules" / release / "modules.dep").exists():
        raise LabUnavailable(f"cannot index the kernel's modules: {done.stderr.strip()}")


def _put_in_place(made: Path, complete: Path) -> None:
    try:
        made.rename(complete)
    except OSError:
        if not complete.is_dir():  # otherwise somebody else was quicker, with the same contents
            raise


def _point_current_at(complete: Path) -> None:
    current = complete.parent / "current"
    with tempfile.TemporaryDirectory(dir=complete.parent, prefix=".linking-") as temporary:
        link = Path(temporary) / "current"
        link.symlink_to(complete.name)
        link.replace(current)


def _remove_older(complete: Path) -> None:
    for folder in complete.parent.glob("linux-image-*"):
        if folder == complete:
            continue
        with contextlib.suppress(OSError), (folder / "release").open("rb") as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)


def initramfs(image: Image, files: dict[str, bytes]) -> bytes:
    """An uncompressed initramfs (unpacking is what an emulated processor is slow at): busybox as
    /bin/busybox, the modules as /modules/NN-NAME in the order they must be loaded, and `files`, of which only
    root may see the inside."""
    order = load_order((image.modules / "modules.dep").read_text(), MODULES)
    entries = [
        cpio.file("bin/busybox", image.busybox.read_bytes(), 0o755),
        cpio.link("bin/sh", "busybox"),
        *(cpio.folder(name) for name in ("dev", "proc", "sys", "host", "scratch", "newroot")),
    ]
    for number, path in enumerate(order):
        entries.append(cpio.file(f"modules/{number:02}-{Path(path).name}", (image.modules / path).read_bytes()))
    for name, data in files.items():
        entries.append(cpio.file(name, data, 0o700))
    return cpio.archive(entries)

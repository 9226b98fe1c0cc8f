"""The lab's kernels, each with a busybox, kept in the user's cache folder, and the initramfs made from them.

    ~/.cache/upcall/testing/lab/PACKAGE_VERSION/   vmlinuz  busybox  release  modules/
    ~/.cache/upcall/testing/lab/current            a link to the newest of these that QEMU boots
    ~/.cache/upcall/testing/lab/current-uml        the same for User-mode Linux: there vmlinuz is a program

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

from upcall.testing.lab import cpio, packages
from upcall.testing.lab.errors import LabUnavailable
from upcall.testing.lab.modules import load_order
from upcall.testing.lab.packages import Say

BUSYBOX_PACKAGE = "busybox-static"
NEEDED_BYTES = 1 << 30  # while it is unpacked; about 400 MB stay


@dataclass(frozen=True)
class GuestKernel:
    """One of the lab's two. `current` is its link in the cache, `folders` what the names of its folders begin with,
    `origin` the package that apt must know, `modules` what the guest needs before it sees the host's files, and what
    every command finds loaded."""

    name: str
    current: str
    folders: str
    origin: str
    modules: tuple[str, ...]

    def package(self) -> str | None:
        """The package with the kernel itself; None when apt knows none."""
        if self.origin == packages.KERNEL_META_PACKAGE:
            return packages.kernel_package()
        return self.origin


QEMU = GuestKernel(
    "qemu",
    "current",
    "linux-image-",
    packages.KERNEL_META_PACKAGE,
    ("virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay", "ecb", "ecryptfs"),
)
UML = GuestKernel("uml", "current-uml", "user-mode-linux_", packages.UML_PACKAGE, ("overlay",))
KERNELS = {kernel.name: kernel for kernel in (QEMU, UML)}


def named(kernel: str) -> GuestKernel:
    """One of KERNELS. Raises ValueError, which names them, for any other."""
    try:
        return KERNELS[kernel]
    except KeyError:
        raise ValueError(f"the lab has no kernel {kernel!r}; it has {', '.join(KERNELS)}") from None


@dataclass(frozen=True)
class Image:
    """A complete folder in the cache; `release` is what `uname -r` says in the guest."""

    folder: Path
    release: str
    of: GuestKernel = QEMU

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


def cached(kernel: GuestKernel = QEMU) -> Image | None:
    """The image that a run would use, or None before the first fetch."""
    try:
        folder = (cache_folder() / kernel.current).resolve(strict=True)
        return Image(folder, (folder / "release").read_text().strip(), kernel)
    except OSError:
        return None


def ensure(say: Say, kernel: GuestKernel = QEMU) -> Image:
    """The cached image, fetched first if there is none."""
    return cached(kernel) or fetch(say, kernel)


def fetch(say: Say, kernel: GuestKernel = QEMU) -> Image:
    """Downloads the newest kernel that apt knows, unless the cache has it, and makes it the current one.

    Raises LabUnavailable with the remedy when it cannot."""
    packages.require_tools()
    package, version = _package_to_fetch(kernel, say)
    cache = cache_folder()
    complete = cache / f"{package}_{version.replace(':', '%3a')}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not complete.is_dir():
            with tempfile.TemporaryDirectory(dir=cache, prefix=".making-") as temporary:
                _put_in_place(_make(package, Path(temporary), say), complete)
        _point_at(complete, cache / kernel.current)
    except OSError as error:
        raise LabUnavailable(f"cannot fill the cache folder {cache}: {error.strerror}") from error
    _remove_older(complete, kernel)
    return Image(complete, (complete / "release").read_text().strip(), kernel)


def _package_to_fetch(kernel: GuestKernel, say: Say) -> tuple[str, str]:
    def look() -> tuple[str | None, str | None]:
        package = kernel.package()
        return package, packages.candidate(package) if package and packages.candidate(BUSYBOX_PACKAGE) else None

    package, version = look()
    if package is None or version is None:
        packages.update_lists(say)
        package, version = look()
    if package is None or version is None:
        raise LabUnavailable(
            f"apt knows no {kernel.origin} or no {BUSYBOX_PACKAGE}: "
            "add Debian's main archive to apt's sources and run `apt-get update`"
        )
    return package, version


def _make(package: str, temporary: Path, say: Say) -> Path:
    """Downloads and unpacks into `temporary`; gives the folder that is ready to be renamed."""
    unpacked, made = temporary / "unpacked", temporary / "made"
    made.mkdir()
    for file in packages.download([package, BUSYBOX_PACKAGE], temporary, say):
        packages.unpack(file, unpacked)
    say("indexing the kernel's modules")
    # Older and newer packages differ in what lies below /usr; User-mode Linux has places of its own.
    busybox = _only(unpacked, "bin/busybox", "usr/bin/busybox")
    vmlinuz = _only(unpacked, "boot/vmlinuz-*", "usr/bin/linux.uml")
    modules = _only(unpacked, "lib/modules/*", "usr/lib/modules/*", "usr/lib/uml/modules/*")
    release = modules.name
    _index(busybox, modules, temporary / "indexed")
    vmlinuz.rename(made / "vmlinuz")
    busybox.rename(made / "busybox")
    (temporary / "indexed/lib/modules" / release).rename(made / "modules")
    (made / "release").write_text(release + "\n")
    made.chmod(0o755)
    return made


def _only(folder: Path, *patterns: str) -> Path:
    found = [path for pattern in patterns for path in folder.glob(pattern)]
    if not found:
        raise LabUnavailable(f"the downloaded packages have none of {', '.join(patterns)}")
    return found[0]


def _index(busybox: Path, modules: Path, root: Path) -> None:
    """Moves the modules to where depmod looks for them below `root`, and indexes them there.

    Debian's package leaves modules.dep and its like to the installation; busybox's depmod needs no root."""
    (root / "lib/modules").mkdir(parents=True)
    moved = modules.rename(root / "lib/modules" / modules.name)
    done = subprocess.run([str(busybox), "depmod", "-b", str(root), moved.name], capture_output=True, text=True)
    if done.returncode != 0 or not (moved / "modules.dep").exists():
        raise LabUnavailable(f"cannot index the kernel's modules: {done.stderr.strip()}")


def _put_in_place(made: Path, complete: Path) -> None:
    try:
        made.rename(complete)
    except OSError:
        if not complete.is_dir():  # otherwise somebody else was quicker, with the same contents
            raise


def _point_at(complete: Path, current: Path) -> None:
    with tempfile.TemporaryDirectory(dir=complete.parent, prefix=".linking-") as temporary:
        link = Path(temporary) / "current"
        link.symlink_to(complete.name)
        link.replace(current)


def _remove_older(complete: Path, kernel: GuestKernel) -> None:
    for folder in complete.parent.glob(f"{kernel.folders}*"):
        if folder == complete:
            continue
        with contextlib.suppress(OSError), (folder / "release").open("rb") as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)


def initramfs(image: Image, files: dict[str, bytes]) -> bytes:
    """An uncompressed initramfs (unpacking is what an emulated processor is slow at): busybox as
    /bin/busybox, the modules as /modules/NN-NAME in the order they must be loaded, and `files`, of which only
    root may see the inside."""
    order = load_order((image.modules / "modules.dep").read_text(), image.of.modules)
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

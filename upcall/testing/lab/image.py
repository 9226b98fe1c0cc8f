"""Fetches the lab's kernels, each with a busybox, into the user's cache folder, and makes the initramfs.

    ~/.cache/upcall/testing/lab/PACKAGE_VERSION/   vmlinuz  busybox  release  modules/
    ~/.cache/upcall/testing/lab/current            a link to the newest of these that QEMU boots
    ~/.cache/upcall/testing/lab/current-uml        the same for User-mode Linux: there vmlinuz is a program

A folder is made under another name and renamed when it is complete, so that concurrent first runs do not conflict. A
process that uses a folder holds a shared lock on it. A fetch removes older ones that are not locked."""

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
NEEDED_BYTES = 1 << 30  # while unpacking; afterwards about 400 MB


@dataclass(frozen=True)
class GuestKernel:
    """One of the lab's two kernels. `current`: its link in the cache. `folders`: prefix of its folders' names.
    `origin`: its package. `modules`: loaded before each command; the guest needs them to access the host's files."""

    name: str
    current: str
    folders: str
    origin: str
    modules: tuple[str, ...]

    def package(self) -> str | None:
        """Returns the package with the kernel itself; None if apt does not know one."""
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
    """Returns one of KERNELS by name. ValueError, which names them, for another name."""
    try:
        return KERNELS[kernel]
    except KeyError:
        raise ValueError(f"the lab has no kernel {kernel!r}; it has {', '.join(KERNELS)}") from None


@dataclass(frozen=True)
class Image:
    """A complete folder in the cache. `release`: as `uname -r` prints it in the guest."""

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
        """The folder for /lib/modules/RELEASE."""
        return self.folder / "modules"

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """A context in which a fetch does not remove the folder."""
        with (self.folder / "release").open("rb") as held:
            fcntl.flock(held, fcntl.LOCK_SH)
            yield


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "upcall" / "lab"


def cached(kernel: GuestKernel = QEMU) -> Image | None:
    """Returns the image that a run uses; None before the first fetch."""
    try:
        folder = (cache_folder() / kernel.current).resolve(strict=True)
        return Image(folder, (folder / "release").read_text().strip(), kernel)
    except OSError:
        return None


def ensure(say: Say, kernel: GuestKernel = QEMU) -> Image:
    """Returns the cached image; fetches it first if there is none. LabUnavailable."""
    return cached(kernel) or fetch(say, kernel)


def fetch(say: Say, kernel: GuestKernel = QEMU) -> Image:
    """Downloads apt's newest kernel, unless the cache has it, and makes it the current one.

    LabUnavailable, with the remedy, if that fails."""
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
    """Downloads and unpacks into `temporary`. Returns the complete folder, to be renamed."""
    unpacked, made = temporary / "unpacked", temporary / "made"
    made.mkdir()
    for file in packages.download([package, BUSYBOX_PACKAGE], temporary, say):
        packages.unpack(file, unpacked)
    say("indexing the kernel's modules")
    # Packages differ in whether files are below /usr; User-mode Linux has other paths.
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
    """Moves the modules to depmod's path below `root`, and runs depmod.

    Debian's package does not contain modules.dep and similar files. busybox's depmod needs no root."""
    (root / "lib/modules").mkdir(parents=True)
    moved = modules.rename(root / "lib/modules" / modules.name)
    done = subprocess.run([str(busybox), "depmod", "-b", str(root), moved.name], capture_output=True, text=True)
    if done.returncode != 0 or not (moved / "modules.dep").exists():
        raise LabUnavailable(f"cannot index the kernel's modules: {done.stderr.strip()}")


def _put_in_place(made: Path, complete: Path) -> None:
    try:
        made.rename(complete)
    except OSError:
        if not complete.is_dir():  # otherwise another process was faster, with the same content
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
    """Returns an initramfs, uncompressed because an emulated processor is slow at unpacking: busybox as /bin/busybox,
    the modules as /modules/NN-NAME in the order in which to load them, and `files`, readable by root only."""
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

"""Debian packages of this work tree for tests, built once for each state of it, below build/deb."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from release.build import ROOT, epoch, files

FOLDER = ROOT / "build" / "deb"
NEEDED = {"dpkg-buildpackage": "dpkg-dev", "dh": "debhelper", "gcc": "gcc", "pkg-config": "pkg-config"}


def why_not() -> str:
    """Why no packages can be built here, or "": Debian 12 is needed, with what the target test-tools installs."""
    if absent := [package for tool, package in NEEDED.items() if shutil.which(tool) is None]:
        return f"not installed: {', '.join(absent)}"
    if not Path("/usr/include/tss2/tss2_esys.h").exists():
        return "not installed: libtss2-dev"
    shown = subprocess.run(["/usr/bin/python3", "-V"], capture_output=True, text=True).stdout
    return "" if f" {sys.version_info[0]}.{sys.version_info[1]}." in shown else f"/usr/bin/python3 is {shown.strip()}"


def state() -> str:
    """What names a state of the work tree, without what is in no package; and the commit's time, which packages have
    in their version."""
    known = hashlib.sha256(str(epoch()).encode())
    for name, mode in files():
        if name.startswith(("tests/", "bench/", "fuzz/")):
            continue
        path = ROOT / name
        known.update(f"{name} {mode:o} ".encode() + (path.read_bytes() if path.is_file() else b"") + b"\0")
    return known.hexdigest()[:16]


def packages() -> Path:
    """A folder with the packages of this work tree. Builds them if they are not there yet, which takes minutes."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        there = FOLDER / state()
        if not there.exists():
            for old in FOLDER.iterdir():
                if old.is_dir():
                    shutil.rmtree(old)
            made = build(there.with_suffix(".new"))
            made.rename(there)
        return there


def build(target: Path) -> Path:
    """Builds the packages, as `make deb` does."""
    command = [sys.executable, "-m", "release.deb", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def compiled(folder: Path) -> Path:
    """What py3compile would make of the packages in `folder`, below their names: an emulated processor takes minutes.

    It is valid where the packages are installed: their files have the same times there."""
    target = folder.with_suffix(".compiled")
    if not target.exists():
        made = target.with_suffix(".new")
        for package in sorted(folder.glob("*.deb")):
            tree = made / package.name.partition("_")[0]
            tree.mkdir(parents=True)
            subprocess.run(["dpkg-deb", "-x", package, tree], check=True)
            code = tree / "usr/lib/upcall"
            subprocess.run(["/usr/bin/python3", "-m", "compileall", "-q", "-s", tree, "-p", "/", code], check=True)
            for path in [path for path in tree.rglob("*") if not path.is_dir() and path.parent.name != "__pycache__"]:
                path.unlink()
            for path in sorted((path for path in tree.rglob("*") if path.is_dir()), reverse=True):
                with contextlib.suppress(OSError):  # not empty
                    path.rmdir()
        made.rename(target)
    return target


def newer(folder: Path, target: Path, version: str) -> Path:
    """Packs the packages of `folder` again into `target`, as those of a later version of upcall."""
    target.mkdir(parents=True)
    for number, package in enumerate(sorted(folder.glob("*.deb"))):
        tree = target / f"tree-{number}"
        subprocess.run(["dpkg-deb", "-R", package, tree], check=True)
        control = tree / "DEBIAN/control"
        was = re.search(r"^Version: (.*)$", control.read_text(), re.MULTILINE)
        assert was is not None
        control.write_text(control.read_text().replace(was[1], version))
        for about in tree.rglob("upcall-*.dist-info/METADATA"):
            about.write_text(re.sub(r"^Version: .*$", f"Version: {version}", about.read_text(), flags=re.MULTILINE))
        for module in tree.rglob("site-packages/upcall/__init__.py"):
            module.write_text(re.sub(r'__version__ = ".*"', f'__version__ = "{version}"', module.read_text()))
            os.utime(module, ns=(module.stat().st_mtime_ns + 10**9,) * 2)
        command = ["dpkg-deb", "--root-owner-group", "-Zgzip", "-z1", "-b", str(tree), str(target)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(tree)
    return target

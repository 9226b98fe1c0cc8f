"""`python -m release.build FOLDER`: builds wheels and sdists of upcall and each plugin reproducibly.

Differences between two builds, and how they are avoided:

    modes, times and order of files    built from a copy of the files that git tracks, with git's modes
    time                               SOURCE_DATE_EPOCH, of the last commit unless it is set
    sdists                             setuptools writes its own files with the time of day, and the owner's name and
                                       the umask's modes into the tar: packed again
    the C program                      compiled with relative paths and without debugging information; LC_ALL=C
    the builder's environment          only PATH and CC are kept
    file names in __pycache__          nothing is compiled
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
_KEPT: Final = ("PATH", "CC", "HOME")
_BUILD: Final = """
import sys
from setuptools import build_meta
target = sys.argv[1]  # setuptools puts words of its own there
print(build_meta.build_sdist(target))
print(build_meta.build_wheel(target))
"""


def epoch(root: Path = ROOT) -> int:
    """Returns SOURCE_DATE_EPOCH, or the time of the last commit, in seconds since 1970; not before 1980, because zip
    files cannot express that."""
    told = os.environ.get("SOURCE_DATE_EPOCH")
    if told is None:
        told = subprocess.run(
            ["git", "log", "-1", "--format=%ct"], cwd=root, check=True, capture_output=True, text=True
        ).stdout
    return max(int(told), 315532800)


def files(root: Path = ROOT) -> list[tuple[str, int]]:
    """Returns the sorted (path, mode) of all files that git tracks."""
    listed = subprocess.run(["git", "ls-files", "-s", "-z"], cwd=root, check=True, capture_output=True).stdout
    entries = (line.split("\t", 1) for line in os.fsdecode(listed).split("\0") if line)
    return sorted((path, 0o755 if head.startswith("100755") else 0o644) for head, path in entries)


def stage(target: Path, when: int, root: Path = ROOT) -> None:
    """Copies the tracked files from the work tree, with git's modes and the time `when`."""
    for name, mode in files(root):
        path = target / name
        if not (root / name).is_file():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, path)
        path.chmod(mode)
        os.utime(path, (when, when))


def projects(root: Path = ROOT) -> list[Path]:
    """Returns the folders that become a wheel and an sdist each: upcall's own first, then the plugins' that are not
    part of it."""
    return [root, *sorted(path.parent for path in root.glob("plugins/*/pyproject.toml"))]


def build(folder: Path, target: Path, when: int) -> list[Path]:
    """Builds the sdist and the wheel of one project. Returns their paths in `target`."""
    environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
    environment |= {"SOURCE_DATE_EPOCH": str(when), "LC_ALL": "C", "TZ": "UTC", "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PYTHONHASHSEED"] = "0"
    done = subprocess.run(
        [sys.executable, "-c", _BUILD, str(target)], cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{folder.name}: {done.stderr.strip()[-4000:]}")
    built = [path for path in target.iterdir() if path.name in done.stdout.split()]
    if len(built) != 2:
        raise SystemExit(f"{folder.name}: {len(built)} files came of it, a wheel and an sdist should have")
    for path in built:
        if path.name.endswith(".tar.gz"):
            path.write_bytes(packed_anew(path.read_bytes(), when))
    return built


def packed_anew(sdist: bytes, when: int) -> bytes:
    """Packs an sdist again: sorted names, owner 0, time `when`."""
    plain = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(sdist)) as old,
        tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for found in sorted(old.getmembers(), key=lambda member: member.name):
            member = tarfile.TarInfo(found.name)
            member.type, member.size, member.mtime = found.type, found.size, when
            member.mode = 0o755 if found.isdir() or found.mode & 0o100 else 0o644
            new.addfile(member, old.extractfile(found) if found.isfile() else None)
    out = io.BytesIO()
    with gzip.GzipFile(filename="", fileobj=out, mode="wb", compresslevel=9, mtime=when) as zipped:
        zipped.write(plain.getvalue())
    return out.getvalue()


def dist(target: Path, root: Path = ROOT) -> dict[str, str]:
    """Builds all projects into `target`. Returns file name -> SHA-256."""
    when = epoch(root)
    os.umask(0o022)
    target = target.absolute()
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="upcall-dist-") as folder:
        stage(Path(folder), when, root)
        built: list[Path] = []
        for project in projects(Path(folder)):
            built += build(project, target, when)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(built)}


def main() -> None:
    target = Path(sys.argv[1])
    for name, digest in dist(target).items():
        print(f"{digest}  {name}")


if __name__ == "__main__":
    main()

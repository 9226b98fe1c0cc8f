"""`python -m release.build FOLDER`: wheels and sdists of upcall and of each plugin, reproducible.

What differs between two builds, and what is done about it:

    modes, times and order of files    built from a copy of what git knows, with the modes that git keeps
    time                               SOURCE_DATE_EPOCH, of the last commit unless it is set
    sdists                             setuptools writes its own files with the time of day, and the owner's name and
                                       the umask's modes into the tar: packed anew
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
    """SOURCE_DATE_EPOCH, or when the last commit was made; what zip files can say begins in 1980."""
    told = os.environ.get("SOURCE_DATE_EPOCH")
    if told is None:
        told = subprocess.run(
            ["git", "log", "-1", "--format=%ct"], cwd=root, check=True, capture_output=True, text=True
        ).stdout
    return max(int(told), 315532800)


def files(root: Path = ROOT) -> list[tuple[str, int]]:
    """(path, mode) of what git tracks, sorted."""
    listed = subprocess.run(["git", "ls-files", "-s", "-z"], cwd=root, check=True, capture_output=True).stdout
    entries = (line.split("\t", 1) for line in os.fsdecode(listed).split("\0") if line)
    return sorted((path, 0o755 if head.startswith("100755") else 0o644) for head, path in entries)


def stage(target: Path, when: int, root: Path = ROOT) -> None:
    """A copy of what git tracks, as it is in the work tree now."""
    for name, mode in files(root):
        path = target / name
        if not (root / name).is_file():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, path)
        path.chmod(mode)
        os.utime(path, (when, when))


def build(folder: Path, target: Path, when: int) -> list[Path]:
    """The sdist and the wheel of one project, into `target`."""
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
    """The same files in order of their names, of nobody's, of one time."""
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
    """Everything, into `target`; SHA-256 by file name."""
    when = epoch(root)
    os.umask(0o022)
    target = target.absolute()
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="upcall-dist-") as folder:
        stage(Path(folder), when, root)
        built: list[Path] = []
        for project in [Path(folder), *sorted(Path(folder, "plugins").iterdir())]:
            built += build(project, target, when)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(built)}


def main() -> None:
    target = Path(sys.argv[1])
    for name, digest in dist(target).items():
        print(f"{digest}  {name}")


if __name__ == "__main__":
    main()

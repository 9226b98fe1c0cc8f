"""`python -m release.check`: builds twice in different environments, and compares the digests of the results.

The second build has another folder (with a name of another length), umask, TZ, locale, HOME, order of files, hash seed
and, if that is allowed, host name (a UTS namespace).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from release.build import ROOT, epoch, files

_OTHER = {
    "TZ": "Pacific/Kiritimati",
    "LC_ALL": "C.UTF-8",
    "LANG": "tr_TR.UTF-8",
    "HOME": "/nonexistent",
    "PYTHONHASHSEED": "4242",
    "USER": "somebody-else",
}


def digests(root: Path, target: Path, umask: int, other: bool) -> dict[str, str]:
    """Builds in a process of its own, in `root`. Returns file name -> SHA-256."""
    words = [sys.executable, "-m", "release.build", str(target)]
    if other and (unshare := shutil.which("unshare")) and os.geteuid() == 0:
        words = [unshare, "--uts", "sh", "-c", 'hostname another-host; exec "$@"', "sh", *words]
    environment = {**os.environ, **(_OTHER if other else {}), "SOURCE_DATE_EPOCH": str(epoch())}
    done = subprocess.run(words, cwd=root, env=environment, umask=umask, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(reversed(line.split("  ", 1)) for line in done.stdout.splitlines())  # type: ignore[misc]


def copied(target: Path) -> Path:
    """Copies the work tree, in another order and with another umask, to a repository of its own."""
    for name, mode in reversed(files()):
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, path)
        path.chmod(0o700 if mode & 0o100 else 0o600)
    for words in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *words], cwd=target, check=True)
    return target


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="upcall-check-") as folder:
        one, other = Path(folder, "a"), Path(folder, "another-folder-with-a-longer-name")
        first = digests(ROOT, one, 0o022, other=False)
        second = digests(copied(Path(folder, "work tree")), other, 0o077, other=True)
        differing = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
        for name in sorted(first):
            print(f"{'DIFFERS' if name in differing else 'the same'}  {first[name]}  {name}")
        if differing:
            kept = Path(tempfile.mkdtemp(prefix="upcall-differing-"))
            shutil.copytree(one, kept / "one")
            shutil.copytree(other, kept / "other")
            print(f"{len(differing)} of {len(first)} files differ: compare them in {kept}")
        return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())

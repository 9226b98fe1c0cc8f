"""Downloads Debian packages with apt and unpacks them with dpkg-deb. Installs nothing, and needs no root."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .errors import LabUnavailable

TOOLS = ("apt-get", "apt-cache", "dpkg-deb")
KERNEL_META_PACKAGE = "linux-image-amd64"
UML_PACKAGE = "user-mode-linux"
APT_TIME_LIMIT = 900  # seconds; a kernel is 70 MB

Say = Callable[[str], None]


def missing_tools() -> list[str]:
    return [tool for tool in TOOLS if shutil.which(tool) is None]


def require_tools() -> None:
    """LabUnavailable if the system has no apt or dpkg."""
    if missing := missing_tools():
        raise LabUnavailable(
            f"{', '.join(missing)} not found: the lab's kernel comes from Debian's archive; "
            "use a Debian system (packages apt and dpkg)"
        )


def candidate(package: str) -> str | None:
    """Returns the version that apt would download; None if its lists do not have the package."""
    found = re.search(r"^ *Candidate: (\S+)$", _query("policy", package), re.MULTILINE)
    return found[1] if found and found[1] != "(none)" else None


def kernel_package() -> str | None:
    """Returns the package with the kernel itself, on which Debian's meta package depends; None if apt knows none."""
    found = re.search(r"^ *Depends: (linux-image-\S+)$", _query("depends", KERNEL_META_PACKAGE), re.MULTILINE)
    return found[1] if found else None


def update_lists(say: Say) -> None:
    """Runs `apt-get update`, which needs root. LabUnavailable if this process is not root, or it fails."""
    if os.geteuid() != 0:
        raise LabUnavailable("apt's package lists do not have what the lab needs: run `apt-get update` as root first")
    say("updating apt's package lists")
    _apt_get("update", Path("/"))


def download(packages: Sequence[str], folder: Path, say: Say) -> list[Path]:
    """Downloads packages into `folder`; apt checks their hashes. Returns the .deb files, in any order."""
    say(f"downloading {', '.join(packages)}")
    _apt_get("download", folder, *packages)
    return sorted(folder.glob("*.deb"))


def unpack(package: Path, folder: Path) -> None:
    """Unpacks one .deb file's contents into `folder`."""
    done = subprocess.run(["dpkg-deb", "-x", str(package), str(folder)], capture_output=True, text=True)
    if done.returncode != 0:
        raise LabUnavailable(f"cannot unpack {package.name}: {done.stderr.strip()}")


def _query(*arguments: str) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(["apt-cache", *arguments], capture_output=True, text=True, env=environment).stdout


def _apt_get(verb: str, folder: Path, *packages: str) -> None:
    options = ["-q", "-o", "APT::Sandbox::User=root"]  # the user _apt could not write to the folder
    try:
        # apt's output goes to stderr: stdout is for the guest's output.
        done = subprocess.run(
            ["apt-get", *options, verb, *packages],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno() if _has_descriptor(sys.stderr) else subprocess.DEVNULL,
            timeout=APT_TIME_LIMIT,
        )
    except subprocess.TimeoutExpired as error:
        raise LabUnavailable(f"`apt-get {verb}` did not end within {APT_TIME_LIMIT} s") from error
    if done.returncode != 0:
        raise LabUnavailable(f"`apt-get {' '.join([verb, *packages])}` failed; is the network reachable?")


def _has_descriptor(stream: object) -> bool:
    try:
        return isinstance(stream.fileno(), int)  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False  # a test's stand-in

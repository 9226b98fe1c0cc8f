"""Recognises an installation by Debian's packages, which have set up the machine: docs/packaging.md."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from upcall.install import manifest
from upcall.install.manifest import Manifest, digest
from upcall.install.wanted import SYSTEMD, Order
from upcall.process.debian import HOME, RECORD
from upcall.protocols.request_key.install.system import System

PACKAGE: Final = "upcall"
_UNITS: Final = ("/lib/systemd/system", "/usr/lib/systemd/user")
_MENDS: Final = f"apt install --reinstall ./{PACKAGE}_*.deb"  # it is in no archive


def packaged(system: System) -> Manifest | None:
    """Returns the record of the installed package; None if it is not installed. ConfigError if it is malformed."""
    found = manifest.read(system.at(RECORD))
    return found if found.kind else None


def is_of_package(python: str) -> bool:
    """Returns whether this interpreter, given its path, is the package's."""
    return Path(python).parent.parent == Path(HOME)


def orders(system: System) -> tuple[Order, ...]:
    """Returns the commands after which the packages' services run, when others' units no longer take precedence."""
    if system.root != Path("/") or not system.at("/run/systemd/system").exists():
        return ()
    there = {unit.name for folder in _UNITS for unit in system.at(folder).glob("upcall-*")}
    found = [tuple(word for word in order if not word.startswith("upcall-") or word in there) for order in
             SYSTEMD.live.on if order[0] == "systemctl"]  # fmt: skip
    return tuple(found)


def missing(system: System, record: Manifest) -> list[str]:
    """Returns what is not as the package has installed it, for people: missing files, changed files that are not for
    an administrator to change, and files of `upcall setup` that take precedence over the package's."""
    found = []
    for path, known in record.files.items():
        try:
            same = digest(system.at(path).read_bytes()) == known or path.startswith("/etc/")
        except FileNotFoundError:
            found.append(f"{path}: is not there: {_MENDS}")
        else:
            if not same:
                found.append(f"{path}: says something else: {_MENDS}")
    earlier = manifest.read(system.at(manifest.FILE))
    shadowing = [path for path in earlier.files if system.at(path).exists()]
    found += [f"{path}: takes precedence over the package's: `upcall setup --undo` removes it" for path in shadowing]
    return found

"""Names the command that has upcall answer types of keys: apt's, where Debian's packages have set up the system."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from shlex import quote

from upcall.process.debian import HOME, RECORD
from upcall.protocols.request_key.install.system import FOLDER, System
from upcall.protocols.request_key.key_types import KEY_TYPES


def lines_of(package: str) -> str:
    """Returns the path of the lines for request-key in a handler's package, which copies them to FOLDER."""
    return f"{HOME}/request-key/{package}.conf"


def is_packaged(system: System) -> bool:
    """Returns whether Debian's package upcall is installed in this system."""
    return system.at(RECORD).exists()


def lacks_package(system: System, name: str) -> bool:
    """Returns whether Debian's packages have set up this system, and that of the key type's handler is missing."""
    return is_packaged(system) and not system.at(lines_of(KEY_TYPES[name].package)).exists()


def command_to_install(system: System, names: Iterable[str]) -> str:
    """Returns the command with which root has upcall answer these key types, and those that it answers already.

    Without its package a type has no handler, which lines do not replace: so packages come first, and their lines only
    if these were removed."""
    image = "" if system.root == Path("/") else quote(str(system.root))
    if not is_packaged(system):
        return f"upcall request-key install{f' --root {image}' if image else ''}{_options(system, names)}"
    chroot = f"chroot {image} " if image else ""
    packages = tuple(dict.fromkeys(KEY_TYPES[name].package for name in names))
    if absent := [package for package in packages if not system.at(lines_of(package)).exists()]:
        return f"{chroot}apt install {' '.join(f'./{package}_*.deb' for package in absent)}"
    return f"{chroot}cp {' '.join(map(lines_of, packages))} {FOLDER}"


def _options(system: System, names: Iterable[str]) -> str:
    """Returns the options --type of `upcall request-key install`, which replace the types that are installed."""
    try:
        ours = system.ours()
    except OSError:
        ours = None
    installed = () if ours is None else ours.types
    wanted = dict.fromkeys((*installed, *names))
    return "" if len(wanted) == len(installed) else "".join(f" --type {name}" for name in wanted)

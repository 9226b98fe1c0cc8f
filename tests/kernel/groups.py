"""Assigns the files of ring 3 to boots of the lab's kernels.

A boot for each kernel and process 1, and for what would disturb each other: mounts of eCryptfs, request-key's lines
and name services, logins and disks. A file's name says where its tests run: by default they need QEMU's kernel, which
has eCryptfs; what needs no eCryptfs begins with one of ELSEWHERE.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

INIT = Path("/usr/lib/systemd/systemd")


class Place(NamedTuple):
    """`group`: the boot. `kernels`: each runs the file; where User-mode Linux cannot run, QEMU does it once."""

    group: str
    kernels: tuple[str, ...] = ("qemu",)


# By the beginning of the file's name, the longest that fits, and in the order in which they run in their boot.
ELSEWHERE: Mapping[str, Place] = {
    "test_both": Place("requests", ("uml", "qemu")),
    "test_forwarder": Place("requests", ("uml",)),
    "test_requestkey": Place("requests", ("uml",)),
    "test_dns": Place("requests"),
    "test_nfs": Place("requests"),
    "test_cifs": Place("requests", ("uml", "qemu")),
    "test_cifs_idmap": Place("requests"),  # last: its winbindd would change the others' file server
    "test_quota_ext4": Place("machine", ("uml",)),
    "test_quota_xfs": Place("machine"),
    "test_login_pam": Place("machine"),
    "test_session": Place("machine", ("uml",)),
    "test_units": Place("machine"),  # last: systemd leaves its folder in /run, by which it is detected
    "test_login_systemd": Place("systemd"),
    "test_machine_systemd": Place("systemd"),
}
INITS: Mapping[str, Path] = {"systemd": INIT}
LINK = ("test_captured", "test_link")
LAST = ("test_plugin_new",)  # installs something
CORE = ("link",)  # what `make test` boots for; `make test-all` boots for each group


class Group(NamedTuple):
    """The files of one boot."""

    kernel: str
    files: tuple[str, ...]
    init: Path | None = None  # process 1, if not the lab's own


def elsewhere(file: str) -> str | None:
    """The beginning in ELSEWHERE that a file's name has, or None for a test of eCryptfs."""
    return max((beginning for beginning in ELSEWHERE if file.startswith(beginning)), key=len, default=None)


def groups(files: Iterable[str], uml: bool = True) -> dict[str, Group]:
    """The groups of these files by name, in the order in which they run; none is empty, and no kernel runs a file
    twice. `uml`: whether User-mode Linux runs here."""
    order = list(ELSEWHERE)
    found = {"link": Group("qemu", ()), "ecryptfs": Group("qemu", ())}
    for name in sorted(files, key=lambda name: (name.startswith(LAST), name)):
        if elsewhere(name) is None:
            group = "link" if name.startswith(LINK) else "ecryptfs"
            found[group] = found[group]._replace(files=(*found[group].files, name))
    placed = sorted((order.index(beginning), name) for name in files if (beginning := elsewhere(name)))
    for position, name in placed:
        group, kernels = ELSEWHERE[order[position]]
        for kernel in kernels if uml else ("qemu",):
            boot = group if kernel == "qemu" else f"{group}-{kernel}"
            before = found.get(boot, Group(kernel, (), INITS.get(group)))
            found[boot] = before._replace(files=(*before.files, name))
    return {name: group for name, group in found.items() if group.files}


FILES = sorted(path.name for path in Path(__file__).parent.glob("test_*.py"))

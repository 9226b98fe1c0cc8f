"""Which files of ring 3 share a boot, and which of the lab's kernels boots.

A file's name says where its tests run: by default on QEMU's kernel, which has eCryptfs; what needs no eCryptfs begins
with one of ELSEWHERE and has boots of its own, on every kernel named there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

ELSEWHERE: Mapping[str, tuple[str, ...]] = {
    "test_both": ("uml", "qemu"),
    "test_cifs_idmap": ("qemu",),  # whose winbindd would have its say in the others' file server
    "test_cifs": ("uml", "qemu"),
    "test_dns": ("qemu",),
    "test_forwarder": ("uml",),
    "test_login_pam": ("qemu",),
    "test_login_systemd": ("qemu",),
    "test_machine_systemd": ("qemu",),
    "test_nfs": ("qemu",),
    "test_quota_ext4": ("uml",),
    "test_quota_xfs": ("qemu",),
    "test_requestkey": ("uml",),
    "test_session": ("uml",),
    "test_units_quota": ("qemu",),  # whose systemd starts when there is a disk
    "test_units": ("qemu",),
}
SYSTEMD = ("test_login_systemd", "test_machine_systemd")  # of these: systemd is process 1
INIT = Path("/usr/lib/systemd/systemd")
HARSH = ("test_broker_faults.py", "test_daemon_faults.py", "test_device.py")
ATTACKS = ("test_attack_link.py",)
LINK = ("test_captured.py", "test_link.py")
PLUGIN = ("test_plugin_new.py",)  # installs something


class Group(NamedTuple):
    """The files of one boot."""

    kernel: str
    files: tuple[str, ...]
    init: Path | None = None  # process 1, if not the lab's own


def elsewhere(file: str) -> str | None:
    """The beginning in ELSEWHERE that a file's name has, or None for a test of eCryptfs."""
    return next((beginning for beginning in ELSEWHERE if file.startswith(beginning)), None)


def groups(files: Iterable[str]) -> dict[str, Group]:
    """The groups of these files by name, in the order in which they run; none is empty."""
    names = sorted(files)
    ordinary = tuple(name for name in names if not elsewhere(name) and name not in (*HARSH, *ATTACKS, *LINK, *PLUGIN))
    found = {
        "link": Group("qemu", tuple(name for name in names if name in LINK)),
        "files": Group("qemu", ordinary),
        "faults": Group("qemu", tuple(name for name in names if name in HARSH)),
        "attacks": Group("qemu", tuple(name for name in names if name in ATTACKS)),
        "plugin": Group("qemu", tuple(name for name in names if name in PLUGIN)),
    }
    for beginning, kernels in ELSEWHERE.items():
        chosen = tuple(name for name in names if elsewhere(name) == beginning)
        for kernel in kernels:
            found[f"{beginning.removeprefix('test_').replace('_', '-')}-{kernel}"] = Group(
                kernel, chosen, INIT if beginning in SYSTEMD else None
            )
    return {name: group for name, group in found.items() if group.files}


CORE = ("link",)  # what `make test` boots for; `make test-all` boots for each group
GROUPS = groups(path.name for path in Path(__file__).parent.glob("test_*.py"))

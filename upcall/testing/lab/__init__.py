"""Runs a real Linux kernel in a virtual machine, with this Python environment inside.

`run` boots Debian's kernel in QEMU (software emulation: no KVM, no root), runs one command as the guest's root and
returns its exit code. The guest sees the host's files through a scratch layer: it can write anywhere, but only files
in /results reach the host.

`run(..., kernel="uml")` does the same with Debian's User-mode Linux, an ordinary program: it boots in three seconds,
and Python is about ten times as fast in it; system calls are slower. It has

- built in: keys and request_key, ext4, XFS, Btrfs, quota with its netlink messages, hostfs;
- as modules, which `modprobe` loads: cifs (with upcalls), dns_resolver, fuse, quota_v2, quota_v1, loop, nfs, 9p,
  nls_*, overlay (loaded), and ecryptfs, but without its messages: no /dev/ecryptfs;
- not: fanotify's permission events, a second processor.

A fault of its kernel always ends it (MachineDied). Files in /results belong to the host's user who started it, as with
QEMU for all users but root. Each of the host's files in the guest's caches costs a descriptor, up to the hard limit of
RLIMIT_NOFILE. It is no sandbox: the guest's root can mount the host's files (hostfs), with the permissions of the user
who started it."""

from __future__ import annotations

from upcall.testing.lab.doctor import why_not
from upcall.testing.lab.errors import LabError, LabTimedOut, LabUnavailable, MachineDied
from upcall.testing.lab.machine import Result, run

__all__ = ["LabError", "LabTimedOut", "LabUnavailable", "MachineDied", "Result", "run", "why_not"]

"""Fuzzes mountinfo and /etc/projid: any user can choose names of mount points, in a user namespace or by FUSE.

Never raises. At most one mount per line. Names are decoded as file names.
"""

from __future__ import annotations

import os

from fuzz.target import holds
from upcall.kernel.mounts import take_mounts

SEEDS = [
    b"21 1 254:3 / / rw,relatime shared:1 - ext4 /dev/vda3 rw,prjquota\n",
    b"40 32 7:1 / /tmp/x\\040y\\134\\011z rw - xfs /dev/loop1 rw,attr2\n41 32 0:45 /s /m ro - tmpfs tmpfs rw\n",
    b"1 2 7:0 / /\xff rw - a - b rw\n",
    b"1 2 99999999999:99999999999 / / rw - x y z\n",
]


def run(data: bytes) -> None:
    found = take_mounts(data)
    holds(len(found) <= data.count(b"\n") + 1, "more mounts than lines")
    for mount in found:
        holds(len(os.fsencode(mount.point)) <= len(data), "a mount point that is nowhere")

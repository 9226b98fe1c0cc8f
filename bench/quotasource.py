"""Runs a quota source with a simulated kernel: it receives warnings from a group of NETLINK_USERSOCK.

`python -m bench.quotasource FOLDER GROUP SENDER`; FOLDER is the broker's.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from upcall.kernel.genetlink import Ids, Listener
from upcall.kernel.mounts import Mount
from upcall.kernel.netlink import NETLINK_USERSOCK
from upcall.kernel.process import harden, prefer_us
from upcall.process.paths import Place
from upcall.protocols.quota.process import SourceProcess
from upcall.protocols.quota.settings import Rules
from upcall.protocols.quota.source import QuotaSetup
from upcall.protocols.quota.warning import NOTHING, Figures, Quota

FAMILY = 28
_DISK = Mount(os.makedev(7, 0), "/", "/played", "ext4", "/dev/loop0", frozenset())
_FULL = Figures(10 << 20, 9 << 20, 10 << 20, 0)


class PlayedWorld:
    """A simulated file system on which every user has reached the limits."""

    def filesystems(self) -> dict[Mount, tuple[int, ...]]:
        return {_DISK: (0,)}

    def changed(self) -> bool:
        return False

    def get(self, mount: Mount, kind: int, number: int) -> Quota:
        return Quota(number, _FULL, NOTHING)

    def some(self, mount: Mount, kind: int, first: int, most: int) -> tuple[list[Quota], int]:
        return [], -1

    def grace(self, _: Mount, __: int, ___: str) -> int:
        return 0

    def name(self, _: int, number: int) -> str:
        return str(number)


def played(state: Path, group: int, sender: int) -> QuotaSetup:
    """Returns the setup for listening to the simulated kernel, whose portid is `sender`."""
    return QuotaSetup(
        Rules(),
        state,
        Ids(FAMILY, group),
        PlayedWorld(),
        lambda ids: Listener(ids.group, protocol=NETLINK_USERSOCK, sender=sender),
    )


def main(folder: str, group: str, sender: str) -> None:
    harden()
    prefer_us()
    place = Place(Path(folder))
    process = SourceProcess(place, played(place.folder / "quota.json", int(group), int(sender)))
    process.heed_signals()
    process.run()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Runs a quota source with simulated kernel and file system: `python quotasource.py FOLDER GROUP SENDER`.

As bench/quotasource.py; but on its file system the uids listed in FOLDER/../over have reached their limits.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench.quotasource import PlayedWorld, played
from upcall.kernel.mounts import Mount
from upcall.process.paths import Place
from upcall.protocols.quota.process import SourceProcess
from upcall.protocols.quota.warning import NOTHING, Quota


class World(PlayedWorld):
    def __init__(self, over: Path) -> None:
        self._over = over

    def get(self, mount: Mount, kind: int, number: int) -> Quota:
        return super().get(mount, kind, number) if number in self._uids() else Quota(number, NOTHING, NOTHING)

    def some(self, mount: Mount, kind: int, first: int, most: int) -> tuple[list[Quota], int]:
        return [self.get(mount, kind, uid) for uid in sorted(self._uids()) if uid >= first], -1

    def _uids(self) -> set[int]:
        return {int(line) for line in self._over.read_text().split()}


def main(folder: str, group: str, sender: str) -> None:
    place = Place(Path(folder))
    setup = played(place.folder.parent / "quota.json", int(group), int(sender))
    process = SourceProcess(place, setup._replace(world=World(place.folder.parent / "over")))
    process.heed_signals()
    process.run()


if __name__ == "__main__":
    main(*sys.argv[1:])

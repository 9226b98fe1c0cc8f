"""How often an answer costs the caller the kernel's whole timeout, although it was there at once.

The requester goes to sleep after it has sent its request without looking whether the answer has come already
(fs/ecryptfs/messaging.c, ecryptfs_wait_for_response). `upcall lab run -- python -m tests.kernel.measure_lost_wakeups`
creates and opens many files, with the broker under SCHED_BATCH, as it runs, and without. It asserts nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.kernel.scene import CONTENT, House, enrol, keys, vault
from upcall.kernel.process import schedule_as_batch
from upcall.protocols.ecryptfs import source as devices
from upcall.testing.lab.stage import Person, do_as, kernel_faults, person

LOST = 1.0  # seconds: no other delay comes near it
KEY = keys()["rsa2048"]


class Times(NamedTuple):
    """Of so many calls: how many were lost, the longest other one, and calls per second."""

    calls: int
    lost: int
    longest: float
    rate: float


def timed(calls: list[Callable[[], object]]) -> Times:
    spans = []
    for call in calls:
        start = time.monotonic()
        call()
        spans.append(time.monotonic() - start)
    others = [span for span in spans if span < LOST]
    return Times(len(spans), len(spans) - len(others), max(others), len(others) / sum(others))


def measure(who: Person, count: int) -> tuple[Times, Times]:
    house = House()
    try:
        house.open()
        house.daemon(who)
        with vault(who, KEY.signature) as files:
            paths = [files.upper / f"f{number}" for number in range(count)]
            created = do_as(who, lambda: timed([_creating(path) for path in paths]))
            files.remount()
            opened = do_as(who, lambda: timed([path.read_bytes for path in paths]))
        return created, opened
    finally:
        house.close()


def _creating(path: Path) -> Callable[[], object]:
    return lambda: path.write_bytes(CONTENT)


def main(count: int) -> None:
    who = person("alice")
    enrol(who, KEY)
    as_it_is = schedule_as_batch
    for name, schedule in (("SCHED_BATCH", as_it_is), ("SCHED_OTHER", lambda: None)):
        vars(devices)["schedule_as_batch"] = schedule
        for what, times in zip(("create", "open"), measure(who, count), strict=True):
            print(f"{name} {what}: {times}", flush=True)
    print("kernel faults:", kernel_faults(), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)

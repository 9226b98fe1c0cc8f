"""Dropping capabilities, on the kernel that we run on."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.escaping import outcome
from upcall.kernel import capabilities, process
from upcall.testing.processes import in_child

HEADER = Path("/usr/include/linux/capability.h")


def of(pid: int | str) -> dict[str, int]:
    """What proc(5) says: CapEff and its like."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1], 16) for line in lines if line.startswith("Cap")}


def test_capability_names_match_the_kernels_header() -> None:
    if not HEADER.exists():
        pytest.skip(f"there is no {HEADER} here")
    known = re.findall(r"#define CAP_(\w+)\s+(\d+)\n", HEADER.read_text())
    assert [name for name, _ in known] == [*capabilities.NAMES][: len(known)]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has any")
def test_capabilities_that_are_not_kept_are_dropped_for_good(tmp_path: Path) -> None:
    def tried() -> list[object]:
        process.harden()
        left = capabilities.keep_only({"SETUID", "KILL"})
        mine = of("self")
        pid = os.fork()
        if pid == 0:  # no program brings anything back
            os.execv("/bin/sh", ["sh", "-c", "grep -q 'CapEff:\t00000000000000a0' /proc/self/status"])
        kept = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        again = capabilities.keep_only({"SETUID", "KILL", "SYS_ADMIN"})
        return [sorted(left), mine, kept, sorted(again), outcome(lambda: os.chown(tmp_path, 1, 1))]

    left, mine, kept, again, chowned = in_child(tried)
    assert left == again == ["KILL", "SETUID"]
    assert mine == {"CapInh": 0, "CapPrm": 0xA0, "CapEff": 0xA0, "CapBnd": 0xA0, "CapAmb": 0}
    assert (kept, chowned) == (0, "EPERM")


@pytest.mark.skipif(os.geteuid() == 0, reason="root has some")
def test_a_process_without_capabilities_keeps_none() -> None:
    assert in_child(lambda: sorted(capabilities.keep_only({"SETUID"}))) == []

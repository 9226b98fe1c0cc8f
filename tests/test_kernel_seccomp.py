"""The filter: instruction by instruction, as the kernel would run it, and on the kernel that we run on."""

from __future__ import annotations

import errno
import os
import re
import struct
import threading
from pathlib import Path
from typing import Any

import pytest

from tests import escaping
from upcall.kernel import process, seccomp
from upcall.kernel.seccomp import AND_INTERNET, NAMED, UNIX_AND_NETLINK, Instruction, program
from upcall.testing.processes import in_child

MACHINES = ("x86_64", "aarch64")
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ARGUED = {"x86_64": {56, 435, 41, 16}, "aarch64": {220, 435, 198, 29}}
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}
ALLOW = 0x7FFF0000

here = pytest.mark.skipif(bool(seccomp.why_not()), reason=f"seccomp: {seccomp.why_not()}")


def result(filter_: list[Instruction], machine: str, number: int, *arguments: int, arch: int = 0) -> tuple[int, int]:
    """(what it returns, how many instructions that took)"""
    words = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("<iIQ6Q", number, arch or ARCHITECTURES[machine], 0, *words)
    held = at = steps = 0
    while True:
        code, k, true, false = filter_[at]
        at, steps = at + 1, steps + 1
        if code == 0x20:
            held = int.from_bytes(data[k : k + 4], "little")
        elif code == 0x06:
            return k, steps
        else:
            at += true if {0x15: held == k, 0x35: held >= k, 0x45: bool(held & k)}[code] else false


def refused(code: int) -> int:
    return 0x00050000 | code


@pytest.mark.parametrize("machine", MACHINES)
def test_what_is_named_is_refused_and_nothing_else(machine: str) -> None:
    filter_ = program(NAMED, AND_INTERNET, machine)
    numbers = {numbers[MACHINES.index(machine)] for numbers in NAMED.values()} - {0}
    for number in set(range(600)) - ARGUED[machine]:
        found, steps = result(filter_, machine, number)
        assert found == (refused(errno.EPERM) if number in numbers else ALLOW), number
        assert steps <= 15  # 4 or 5 until the number is known, then one for each level
    assert all(max(one.true, one.false) < 256 for one in filter_)  # a jump is a byte


@pytest.mark.parametrize("machine", MACHINES)
def test_only_what_is_named(machine: str) -> None:
    filter_ = program(NAMED.keys() - {"setresuid"}, UNIX_AND_NETLINK, machine)
    column = MACHINES.index(machine)
    assert result(filter_, machine, NAMED["setresuid"][column])[0] == ALLOW
    assert result(filter_, machine, NAMED["setuid"][column])[0] == refused(errno.EPERM)


@pytest.mark.parametrize("machine", MACHINES)
def test_what_depends_on_arguments(machine: str) -> None:
    clone, socket, ioctl = {"x86_64": (56, 41, 16), "aarch64": (220, 198, 29)}[machine]
    filter_ = program(NAMED, UNIX_AND_NETLINK, machine)

    def said(*call: int) -> int:
        return result(filter_, machine, *call)[0]

    assert said(clone, 17) == said(clone, 0x3D0F00) == ALLOW  # fork, and glibc's thread
    for bit in (0x20000, *(1 << one for one in range(25, 31))):
        assert said(clone, bit | 17) == refused(errno.EPERM), hex(bit)
    assert said(435) == refused(errno.ENOSYS)
    assert [said(socket, family) for family in (1, 16)] == [ALLOW] * 2
    assert {said(socket, family) for family in (0, 2, 10, 17, 38, 40)} == {refused(errno.EAFNOSUPPORT)}
    assert result(program(NAMED, AND_INTERNET, machine), machine, socket, 10)[0] == ALLOW
    assert said(ioctl, 3, 0x5412) == said(ioctl, 3, 0xFFFFFFFF_00005412) == refused(errno.EPERM)
    assert said(ioctl, 3, 0x541C) == refused(errno.EPERM)
    assert said(ioctl, 0x5412, 0x5401) == ALLOW


@pytest.mark.parametrize("machine", MACHINES)
def test_other_numbers_are_refused(machine: str) -> None:
    filter_ = program(NAMED, AND_INTERNET, machine)
    for arch in (0x40000003, 0x40000028, *ARCHITECTURES.values()):  # i386, arm
        if arch != ARCHITECTURES[machine]:
            assert result(filter_, machine, 1, arch=arch)[0] == refused(errno.EPERM)
    if machine == "x86_64":
        assert result(filter_, machine, 0x40000001)[0] == refused(errno.EPERM)


@pytest.mark.parametrize("machine", MACHINES)
def test_the_numbers_are_the_kernels(machine: str) -> None:
    header = HEADERS[machine]
    if not header.exists():
        pytest.skip(f"there is no {header} here")
    known: dict[str, int] = {}
    for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text()):
        known.setdefault(name, int(number))
    column, newest = MACHINES.index(machine), max(known.values())
    for name, numbers in NAMED.items():
        if numbers[column] <= newest:
            assert known.get(name, 0) == numbers[column], name


@here
def test_the_kernel_refuses_it() -> None:
    def tried() -> dict[str, Any]:
        process.harden()
        seccomp.install(NAMED, AND_INTERNET)
        column = MACHINES.index(os.uname().machine)
        calls = {name: numbers[column] for name, numbers in NAMED.items() if numbers[column]}
        return {name: escaping.outcome(lambda n=n: escaping._called(n, -1, -1, -1, -1)) for name, n in calls.items()}  # type: ignore[misc]

    assert set(in_child(tried).values()) == {"EPERM"}


@here
def test_threads_that_are_there_already_are_held_too() -> None:
    def tried() -> list[str]:
        found: list[str] = []
        go = threading.Event()

        def work() -> None:
            go.wait(10)
            found.append(escaping.outcome(lambda: escaping._by_name("personality", 0xFFFFFFFF)))

        thread = threading.Thread(target=work)
        thread.start()
        process.harden()
        seccomp.install(NAMED, AND_INTERNET)
        go.set()
        thread.join(10)
        return found

    assert in_child(tried) == ["EPERM"]


def test_another_machine_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp, "_THIS", "riscv64")
    assert seccomp.why_not() == "not known on riscv64"

"""The filter: instruction by instruction, as the kernel would run it, and on the kernel that we run on."""

from __future__ import annotations

import errno
import re
import struct
import threading
from pathlib import Path
from typing import Any

import pytest

from tests import escaping
from upcall.kernel import process, seccomp, syscalls
from upcall.kernel.seccomp import AND_INTERNET, UNIX_AND_NETLINK, Instruction, program
from upcall.testing.processes import in_child

ARCH = 0xC000003E  # AUDIT_ARCH_X86_64
HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
ARGUED = {56, 435, 41, 16, 157}
GROUPS = (syscalls.COMMON, syscalls.LISTENING, syscalls.LIBRARIES, syscalls.IDS, syscalls.OWNERS, syscalls.QUOTA)
ALLOW = 0x7FFF0000
NETLINK = {seccomp.ROUTE, seccomp.USERSOCK}

here = pytest.mark.skipif(bool(seccomp.why_not()), reason=f"seccomp: {seccomp.why_not()}")


def result(filter_: list[Instruction], number: int, *arguments: int, arch: int = ARCH) -> tuple[int, int]:
    """(what it returns, how many instructions that took)"""
    words = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("<iIQ6Q", number, arch, 0, *words)
    held = at = steps = 0
    while True:
        code, k, true, false = filter_[at]
        at, steps = at + 1, steps + 1
        if code == 0x20:
            held = int.from_bytes(data[k : k + 4], "little")
        elif code == 0x06:
            return k, steps
        elif code == 0x54:
            held &= k
        elif code == 0x05:
            at += k
        else:
            at += true if {0x15: held == k, 0x35: held >= k, 0x45: bool(held & k)}[code] else false


def refused(code: int) -> int:
    return 0x00050000 | code


@pytest.mark.parametrize(
    "calls",
    [seccomp.OF_BROKER, seccomp.OF_DAEMON, {**seccomp.OF_DAEMON, **syscalls.IDS}],
    ids=["broker", "daemon", "daemon with changes of ids"],
)
def test_the_filter_allows_the_listed_calls_only_in_few_steps(calls: dict[str, int]) -> None:
    filter_ = program(calls, AND_INTERNET, NETLINK)
    for number in {*range(700)} - ARGUED:
        found, steps = result(filter_, number)
        new = 335 <= number < 424 or number > 450
        assert found == (ALLOW if number in calls.values() else refused(errno.ENOSYS if new else errno.EPERM)), number
        assert steps <= 20  # 5 until the number is known, then one or two for each level
    assert all(max(one.true, one.false) < 256 for one in filter_)  # a jump is a byte


def test_no_list_contains_a_call_that_must_be_refused() -> None:
    names = {name for group in (seccomp.OF_BROKER, seccomp.OF_DAEMON) for name in group}
    assert not names & {*escaping.REFUSED, *escaping.UNKNOWN}
    assert not {*syscalls.IDS, *syscalls.QUOTA, *syscalls.OWNERS} & names


def test_clone_ioctl_and_prctl_are_filtered_by_their_arguments() -> None:
    filter_ = program(seccomp.OF_DAEMON, AND_INTERNET, NETLINK)

    def said(*call: int) -> int:
        return result(filter_, *call)[0]

    assert said(56, 17) == said(56, 0x3D0F00) == ALLOW  # fork, and glibc's thread
    for bit in (0x20000, *(1 << one for one in range(25, 31))):
        assert said(56, bit | 17) == refused(errno.EPERM), hex(bit)
    assert said(435) == refused(errno.ENOSYS)
    assert said(16, 3, 0x5412) == said(16, 3, 0xFFFFFFFF_00005412) == refused(errno.EPERM)
    assert said(16, 3, 0x541C) == refused(errno.EPERM)
    assert said(16, 0x5412, 0x5401) == ALLOW
    assert said(157, 4, 0) == said(157, 38, 1) == said(157, 3) == ALLOW
    assert said(157, 4, 1) == said(157, 4, 2) == said(157, 35) == said(157, 0x59616D61) == refused(errno.EPERM)


def test_sockets_are_filtered_by_family_type_and_protocol() -> None:
    filter_ = program(seccomp.OF_DAEMON, AND_INTERNET, NETLINK)

    def said(family: int, kind: int, protocol: int = 0) -> int:
        return result(filter_, 41, family, kind, protocol)[0]

    for family in (2, 10):
        assert {said(family, kind | 0x80800, protocol) for kind in (1, 2) for protocol in (0, 6, 17)} == {ALLOW}
        assert said(family, 1, 262) == said(family, 1, 132) == said(family, 2, 1) == refused(errno.EPROTONOSUPPORT)
        assert {said(family, kind) for kind in (3, 4, 5, 6, 10)} == {refused(errno.ESOCKTNOSUPPORT)}
    assert {said(1, kind | 0x80000) for kind in (1, 2, 5)} == {ALLOW}
    assert {said(16, kind, protocol) for kind in (2, 3) for protocol in NETLINK} == {ALLOW}
    assert {said(16, 3, protocol) for protocol in {*range(24)} - NETLINK} == {refused(errno.EPROTONOSUPPORT)}
    assert {said(family, 2) for family in {*range(60)} - {1, 2, 10, 16}} == {refused(errno.EAFNOSUPPORT)}
    local = program(seccomp.OF_BROKER, UNIX_AND_NETLINK, NETLINK)
    assert {result(local, 41, family, 1)[0] for family in (2, 10)} == {refused(errno.EAFNOSUPPORT)}


def test_calls_of_other_architectures_are_refused() -> None:
    filter_ = program(seccomp.OF_DAEMON, AND_INTERNET, NETLINK)
    for arch in (0x40000003, 0x40000028, 0xC00000B7):  # i386, arm, aarch64
        assert result(filter_, 1, arch=arch)[0] == refused(errno.EPERM)
    assert result(filter_, 0x40000001)[0] == refused(errno.EPERM)


def test_system_call_numbers_match_the_kernels_header() -> None:
    if not HEADER.exists():
        pytest.skip(f"there is no {HEADER} here")
    known = {name: int(number) for name, number in re.findall(r"#define __NR_(\w+)\s+(\d+)", HEADER.read_text())}
    for group in (*GROUPS, seccomp._ARGUED, escaping.REFUSED):
        for name, number in group.items():
            if number <= max(known.values()):
                assert known[name] == number, name


@here
def test_the_kernel_refuses_calls_that_the_filter_forbids() -> None:
    def tried() -> dict[str, Any]:
        process.harden()
        seccomp.install(seccomp.OF_DAEMON, AND_INTERNET, NETLINK)
        calls = {**escaping.REFUSED, **escaping.UNKNOWN}
        return {name: escaping.outcome(lambda n=n: escaping._called(n, -1, -1, -1, -1)) for name, n in calls.items()}  # type: ignore[misc]

    found = in_child(tried)
    assert {found[name] for name in escaping.REFUSED} == {"EPERM"}
    assert {found[name] for name in escaping.UNKNOWN} == {"ENOSYS"}


@here
@pytest.mark.parametrize("name", escaping.HOLES)
def test_known_holes_are_open_without_the_filter_and_closed_with_it(name: str) -> None:
    act, refusal = escaping.HOLES[name]

    def tried() -> str:
        process.harden()
        seccomp.install(seccomp.OF_DAEMON, AND_INTERNET, NETLINK)
        seccomp.refuse_listening()
        return escaping.outcome(act)

    before = in_child(lambda: escaping.outcome(act))
    if name in ("MPTCP", "raw packets") and before != "done":
        pytest.skip(f"{name}: this kernel, or its user, has none anyway")
    assert (before, in_child(tried)) == ("done", refusal)


@here
def test_the_filter_applies_to_threads_that_run_already() -> None:
    def tried() -> list[str]:
        found: list[str] = []
        go = threading.Event()

        def work() -> None:
            go.wait(60)
            found.append(escaping.outcome(lambda: escaping._by_name("personality", 0xFFFFFFFF)))

        thread = threading.Thread(target=work)
        thread.start()
        process.harden()
        seccomp.install(seccomp.OF_DAEMON, AND_INTERNET, NETLINK)
        go.set()
        thread.join(60)
        return found

    assert in_child(tried) == ["EPERM"]


def test_on_another_architecture_the_filter_is_unavailable_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine in ("riscv64", "aarch64"):
        monkeypatch.setattr(seccomp, "_THIS", machine)
        assert seccomp.why_not() == f"not known on {machine}"

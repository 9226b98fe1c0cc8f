"""What a process does to itself, as the kernel then tells of it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from upcall.kernel import libc, process, procfs
from upcall.kernel.process import LockedMemory
from upcall.testing.processes import in_child

SECRET = b"correct horse battery staple"


def flags_of(address: int) -> list[str]:
    """VmFlags of the mapping that an address lies in (proc(5), smaps)."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            start, end = (int(one, 16) for one in words[0].split("-"))
            inside = start <= address < end
        elif inside and words[0] == "VmFlags:":
            return words[1:]
    return []


def address_of(memory: LockedMemory) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory._pages))


def test_a_secret_is_locked_and_never_dumped() -> None:
    def told() -> list[object]:
        given = bytearray(SECRET)
        memory = LockedMemory(given)
        flags = flags_of(address_of(memory))
        return [memory.locked, "lo" in flags, {"dd", "wf"} <= {*flags}, any(given), repr(memory)]

    allowed = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] >= resource.getpagesize()
    said = f"<LockedMemory {'locked' if allowed else 'not locked'}>"
    assert in_child(told) == [allowed, allowed, True, False, said]


def test_a_locked_secret_cannot_be_paged_out() -> None:
    """MADV_PAGEOUT asks the kernel to do what it does when memory is short; locked pages it refuses (madvise(2))."""
    page_out = 21

    def told() -> list[object]:
        plain, memory = mmap.mmap(-1, resource.getpagesize()), LockedMemory(bytearray(SECRET))
        plain[:4] = b"used"
        plain.madvise(page_out)
        try:
            memory._pages.madvise(page_out)
        except OSError as error:
            return [memory.locked, error.errno]
        return [memory.locked, 0]

    allowed = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] >= resource.getpagesize()
    assert in_child(told) == [allowed, errno.EINVAL if allowed else 0]


def test_a_secret_is_kept_unlocked_if_the_limit_allows_no_locked_memory() -> None:
    def told() -> list[object]:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
        if os.geteuid() == 0:
            from upcall.kernel import capabilities

            capabilities.keep_only(())
        memory = LockedMemory(bytearray(SECRET))
        return [memory.locked, bytes(memory.copy()) == SECRET]

    assert in_child(told) == [False, True]


def test_a_forked_child_sees_zeros_instead_of_the_secret() -> None:
    memory = LockedMemory(bytearray(SECRET))
    assert in_child(lambda: bytes(memory.copy()).hex()) == bytes(len(SECRET)).hex()
    assert memory.copy() == SECRET
    memory.wipe()
    assert not memory.copy() and not any(memory._pages[:])


def test_harden_forbids_core_dumps_new_privileges_and_tracing() -> None:
    def told() -> list[int]:
        process.harden()
        no_new_privs, dumpable = (libc.call("prctl", what, 0, 0, 0, 0) for what in (39, 3))
        return [*resource.getrlimit(resource.RLIMIT_CORE), no_new_privs, dumpable]

    assert in_child(told) == [0, 0, 1, 0]


@pytest.mark.skipif(os.geteuid() != 0, reason="root's right")
def test_the_brokers_present_and_later_memory_is_locked() -> None:
    """Without CAP_IPC_LOCK, or with it where the limit cannot be lifted."""
    from upcall.process import hardening

    def told() -> bool:
        process.harden()
        process.stay_in_memory()
        hardening.of_broker(Path("/tmp/nowhere"), device=Path("/dev/ecryptfs"))
        kept = [bytearray(1 << 20) for _ in range(32)]  # beyond the usual limit of 8 MB
        buffer = bytearray(b"x") * (1 << 20)
        flags = flags_of(ctypes.addressof(ctypes.c_char.from_buffer(buffer)))
        return len(kept) == 32 and "lo" in flags

    assert in_child(told)


@pytest.mark.parametrize("separator", [b"\x0b", b"\x0c", b"\r", b"\x1c", b"\n"], ids=["VT", "FF", "CR", "FS", "LF"])
def test_a_process_name_that_imitates_a_uid_line_does_not_change_the_uid_read(separator: bytes) -> None:
    """prctl(2), PR_SET_NAME: 15 bytes that the process chooses precede its uids in /proc/PID/status."""

    def told() -> int | None:
        ctypes.CDLL(None).prctl(15, separator + b"Uid:\t4242\t", 0, 0, 0)
        return procfs.real_uid(os.getpid())

    assert in_child(told) == os.getuid()


def heaps_of_threads() -> int:
    """The heaps that glibc reserves for threads: 64 MB each, aligned to that, of which the end is inaccessible."""
    size, count = 64 << 20, 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, flags, *_ = line.split()
        start, end = (int(one, 16) for one in span.split("-"))
        count += flags == "---p" and end % size == 0 and start // size == (end - 1) // size
    return count


def heaps_made(shared: bool) -> int:
    """How many heaps four threads make that allocate at the same time."""
    if shared:
        process.share_heap()
    before, ready = heaps_of_threads(), threading.Barrier(5)

    def allocate() -> None:
        kept = bytes(100_000)
        ready.wait()
        ready.wait()
        assert kept

    threads = [threading.Thread(target=allocate) for _ in range(4)]
    for thread in threads:
        thread.start()
    ready.wait()
    found = heaps_of_threads() - before
    ready.wait()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have one heap")
@pytest.mark.parametrize("shared", [True, False])
def test_threads_share_one_heap(shared: bool) -> None:
    """In a new process: threads take over heaps that earlier ones have left."""
    program = f"from tests.test_kernel_process import heaps_made; print(heaps_made({shared}))"
    here = Path(__file__).parents[1]
    said = subprocess.run([sys.executable, "-c", program], cwd=here, capture_output=True, check=True, timeout=120)
    assert (int(said.stdout) == 0) is shared

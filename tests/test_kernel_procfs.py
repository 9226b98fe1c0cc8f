"""What proc(5) says of processes that live, have ended, or choose names that imitate fields."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from upcall.kernel import procfs
from upcall.testing.processes import in_child, until


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as started:
        yield started
        started.kill()


def test_the_fields_of_a_running_process_are_read(child: subprocess.Popen[bytes]) -> None:
    assert procfs.ids(child.pid) == (child.pid, os.getuid(), os.geteuid())
    assert procfs.started_at(child.pid) >= procfs.started_at(os.getpid())
    assert int(procfs.stat(child.pid)[procfs.PARENT]) == os.getpid()
    assert child.pid in procfs.children() and child.pid in procfs.children(os.getpid())
    child.send_signal(signal.SIGSTOP)
    until(lambda: procfs.state(child.pid) == "T", "it is stopped")


def test_a_process_that_has_ended_is_not_found(child: subprocess.Popen[bytes]) -> None:
    pid = child.pid
    with procfs.ProcessFolder(pid) as folder:
        until(lambda: folder.read("comm") == b"sleep\n", "it runs sleep(1)")
        assert folder.link("exe").startswith("/")
        child.kill()
        child.wait()
        with pytest.raises(OSError):
            folder.read("comm")  # also if another process has the pid by now
        assert folder.link("exe") == ""
    for look in (procfs.stat, procfs.started_at, procfs.ids, procfs.hold, procfs.ProcessFolder):
        with pytest.raises((ProcessLookupError, FileNotFoundError)):
            look(pid)
    assert (procfs.state(pid), procfs.real_uid(pid), procfs.tasks(pid), procfs.children(pid)) == ("", None, [], [])
    assert procfs.task_text(pid, "comm", pid) == b""


def test_a_pidfd_refers_to_the_process_of_a_thread() -> None:
    fd, pid = procfs.hold(os.getpid())
    os.close(fd)
    assert pid == os.getpid()


@pytest.mark.parametrize(
    "name", [b"a) S 1 (b", b"x\nUid:\t0\t0\t", b"\x0bPPid:\t1\n"], ids=["stat", "status", "status after VT"]
)
def test_a_process_name_that_imitates_fields_does_not_change_them(name: bytes) -> None:
    def told() -> list[object]:
        ctypes.CDLL(None).prctl(15, name, 0, 0, 0)  # PR_SET_NAME
        status = procfs.read(os.getpid(), "status")
        stat = procfs.stat(os.getpid())
        return [procfs.real_uid_in(status), procfs.parent_in(status), int(stat[procfs.PARENT])]

    assert in_child(told) == [os.getuid(), os.getpid(), os.getpid()]


def test_malformed_texts_give_empty_values() -> None:
    assert procfs.real_uid_in(b"") is None
    assert procfs.parent_in(b"PPid:\tx\n") == 0
    assert procfs.stat_in(b"") == []


def test_a_process_has_stopped_once_all_of_its_threads_have() -> None:
    threads = "[threading.Thread(target=time.sleep, args=(99,)).start() for _ in range(3)]"
    program = f"import threading, time; {threads}; print()"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert not procfs.stopped(process.pid)
        process.send_signal(signal.SIGSTOP)
        until(lambda: procfs.stopped(process.pid), "it has stopped")
        assert {procfs.state(int(task)) for task in os.listdir(f"/proc/{process.pid}/task")} == {"T"}
        process.kill()
    assert not procfs.stopped(process.pid)

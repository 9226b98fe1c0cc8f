"""Descriptions of requesters in prompts: real processes, some with hostile names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from upcall.core.messages import Requester
from upcall.daemon.prompting.requester import describe, plain

ME = os.getuid()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("card", "card"),
        ("a\nb\r\x1b[2J\x07", "a?b??[2J?"),
        ("\u202egpj.exe\u2066", "?gpj.exe?"),
        ("K\u00e4rtchen", "K\u00e4rtchen"),
        ("\udc80\0", "??"),
        ("x" * 200, "x" * 157 + "..."),
    ],
)
def test_unprintable_characters_are_replaced_and_long_texts_cut(text: str, shown: str) -> None:
    assert plain(text) == shown


def test_a_requester_is_described_with_its_program_and_its_parents() -> None:
    first, second = describe("key", Requester(ME, os.getpid()))
    comm = Path("/proc/self/comm").read_text().strip()
    assert first == f"For: {comm} (pid {os.getpid()}, uid {ME}, {os.readlink('/proc/self/exe')}), by the service key"
    assert second.startswith("Started by: ")
    assert f"({os.getppid()})" in second
    assert 1 <= second.count(" (") <= 4


def test_a_requester_without_a_process_is_described_by_its_uid() -> None:
    assert describe("ecryptfs", Requester(ME, 0)) == (f"For: a file on an eCryptfs mount, opened by uid {ME}",)
    assert describe("key", Requester(ME, 0)) == (f"For: a process of uid {ME}, by the service key",)
    assert "your daemon itself" in describe("", Requester(ME, os.getpid()))[0]


def test_a_requester_that_has_ended_is_described_as_ended() -> None:
    with subprocess.Popen(["true"]) as process:
        pass
    ended = f"For: a process that has ended, pid {process.pid}, uid {ME}, by the service key"
    assert describe("key", Requester(ME, process.pid)) == (ended,)


def test_a_pid_reused_by_another_uid_is_described_as_ended() -> None:
    assert "has ended" in describe("key", Requester(ME + 1, os.getpid()))[0]


def test_a_hostile_process_name_is_shown_in_printable_characters() -> None:
    program = (
        "import ctypes, sys; ctypes.CDLL(None).prctl(15, b'x\\nFor: \\x1b[31mssh', 0, 0, 0); "
        "print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        lines = describe("key\n\x1b", Requester(ME, process.pid))
        process.communicate(b"")
    assert lines[0].startswith("For: x?For: ?[31mssh (pid ")
    assert lines[0].endswith("by the service key??")
    assert all(line.isprintable() for line in lines)

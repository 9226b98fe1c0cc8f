"""Fuzzes the description of a requester in prompts: processes choose the content of their status, comm and exe in
/proc.

Never raises. Lines are printable and of bounded length. A name cannot forge the uid or the parent.
"""

from __future__ import annotations

from unittest import mock

from fuzz.target import holds
from upcall.core.messages import Requester
from upcall.daemon.prompting import requester
from upcall.kernel import procfs

SEEDS = [
    b"name",
    b"x\x0bUid:\t0",
    b"x\nUid:\t\nPPid:\t1\n",
    b"x\nUid:\t0",
    b"\x1b]0;title\x07",
    "\u202egnp".encode(),
    b"a" * 200,
]
MOST = 1024


def run(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    name = text[:64].replace("\n", "\\n")
    status = f"Name:\t{name}\nPPid:\t0\nUid:\t1000\t1000\t1000\t1000\n"

    def read(_: procfs.ProcessFolder, what: str) -> bytes:
        return (status if what == "status" else text + "\n").encode("utf-8", "replace")

    with mock.patch.object(procfs.ProcessFolder, "read", read):
        lines = requester.describe("key", Requester(1000, 1))
        holds(not lines[0].startswith("For: a process that has ended"), "another uid by its name")
        holds(all(line.isprintable() and len(line) < 400 for line in lines), "not plain")
    with mock.patch.object(procfs.ProcessFolder, "read", lambda _, what: data):  # no kernel writes that
        lines = requester.describe(text, Requester(1000, 1))
    holds(all(line.isprintable() and len(line) < 400 for line in lines), "not plain")

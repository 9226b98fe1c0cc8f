"""Describes the requester of a PIN to a person. Processes choose their own names, so names are not trusted."""

from __future__ import annotations

from typing import NamedTuple

from upcall.core.messages import Requester
from upcall.kernel import procfs

_PARENTS = 4
_MAX_LINE = 160  # characters


def plain(text: str, limit: int = _MAX_LINE) -> str:
    """Returns a text on one line of at most `limit` characters, without unprintable ones: no escape sequences, and no
    characters that change the direction of writing."""
    shown = "".join(c if c.isprintable() else "?" for c in text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def describe(service: str, requester: Requester) -> tuple[str, ...]:
    """Returns lines that describe the requester and its ancestors. Only the pid if the process has ended."""
    if not service:
        return ("For: your daemon itself, which opens your keys before they are used",)
    if not requester.pid:
        unnamed = f"a process of uid {requester.uid}, by the service {plain(service, 64)}"
        file = f"a file on an eCryptfs mount, opened by uid {requester.uid}"
        return (f"For: {file if service == 'ecryptfs' else unnamed}",)
    first, by = _process(requester.pid), f"by the service {plain(service, 64)}"
    if first is None or first.uid != requester.uid:  # ended; the pid may have been reused
        return (f"For: a process that has ended, pid {requester.pid}, uid {requester.uid}, {by}",)
    exe = f", {plain(first.exe, 100)}" if first.exe else ""
    lines = [f"For: {plain(first.name, 32)} (pid {requester.pid}, uid {requester.uid}{exe}), {by}"]
    parents = [f"{plain(one.name, 32)} ({pid})" for pid, one in _above(first)]
    return (*lines, f"Started by: {', by '.join(parents)}") if parents else tuple(lines)


class _Process(NamedTuple):
    name: str
    exe: str  # "" if it may not be read
    uid: int  # real
    parent: int


def _above(process: _Process) -> list[tuple[int, _Process]]:
    found: list[tuple[int, _Process]] = []
    while len(found) < _PARENTS and process.parent:
        pid, above = process.parent, _process(process.parent)
        if above is None:
            break
        found.append((pid, above))
        process = above
    return found


def _process(pid: int) -> _Process | None:
    """Reads a process's description from /proc (proc(5)). None if it has ended."""
    try:
        with procfs.ProcessFolder(pid) as folder:
            status, comm, exe = folder.read("status"), folder.read("comm"), folder.link("exe")
    except OSError:
        return None
    uid = procfs.real_uid_in(status)
    name = comm.decode("utf-8", "replace").rstrip("\n")
    return None if uid is None else _Process(name, exe, uid, procfs.parent_in(status))

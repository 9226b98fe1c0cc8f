"""Determines the ancestors of a process, for self-deadlock detection.

Source: proc(5). A pid is reused; together with the start time it identifies a process.
"""

from __future__ import annotations

from upcall.kernel import procfs

_MOST = 64  # generations examined


def line_of(pid: int) -> frozenset[tuple[int, int]]:
    """Returns (pid, start time in clock ticks since boot) of a process and of each living ancestor. Empty for pid 0,
    by which the kernel names a process of another pid namespace.

    Limitation: a double fork makes init, or a "subreaper", the parent, so earlier ancestors are not found.
    """
    found: set[tuple[int, int]] = set()
    child = 1 << 64
    for _ in range(_MOST):
        if pid <= 0:
            break
        try:
            fields = procfs.stat(pid)
        except OSError:
            break
        started = int(fields[procfs.STARTED])
        if started > child:
            break  # the parent has ended and its pid was reused: a parent is never younger than its child
        found.add((pid, started))
        pid, child = int(fields[procfs.PARENT]), started
    return frozenset(found)

"""From whom a process descends.

Source: proc(5). A pid alone says little: it is somebody else's soon. Together with the time at which the process began
it is nobody else's.
"""

from __future__ import annotations

from upcall.kernel import procfs

_MOST = 64  # generations that are looked at


def line_of(pid: int) -> frozenset[tuple[int, int]]:
    """(pid, beginning) of a process and of its parents, theirs, and so on, as far as they live; of nobody for pid 0,
    which is how the kernel names a process of another pid namespace.

    Not seen: who left the family by a double fork. Its parent is init, or a "subreaper", from then on.
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
            break  # the parent has ended since, and its pid is another's: parents are never younger
        found.add((pid, started))
        pid, child = int(fields[procfs.PARENT]), started
    return frozenset(found)

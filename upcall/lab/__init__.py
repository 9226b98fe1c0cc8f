"""A real Linux kernel in a virtual machine, with this very Python environment inside.

`run` boots Debian's own kernel in QEMU (pure software emulation: no KVM, no root), runs one command as the
guest's root and gives its exit code back. The guest sees the host's files through a scratch layer: it can
write anywhere, and nothing of it reaches the host but what is put into /results."""

from __future__ import annotations

from .doctor import why_not
from .errors import LabError, LabTimedOut, LabUnavailable, MachineDied
from .machine import Result, run

__all__ = ["LabError", "LabTimedOut", "LabUnavailable", "MachineDied", "Result", "run", "why_not"]

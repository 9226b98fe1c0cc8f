"""Describes one start of a machine, of either kind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .image import Image

# The guest's streams, in this order; session.sh finds them by these names (qemu.sh, uml.sh).
PORTS = ("control", "out", "err", "log")


@dataclass(frozen=True)
class Machine:
    """`console` is the file for the kernel's console, `results` the folder the guest may write, `memory` is in MB;
    with `terminal` the port `out` is a terminal in the guest. All of it lies in folders of this run's own."""

    image: Image
    initramfs: Path
    console: Path
    results: Path
    memory: int
    cpus: int
    terminal: bool = False

    @property
    def complaints(self) -> Path:
        """The file for what the program says that runs the machine."""
        return self.console.with_name("complaints")

"""Describes one start of a machine, of either kind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .image import Image

# The guest's streams, in this order; session.sh uses these names (qemu.sh, uml.sh).
PORTS = ("control", "out", "err", "log")


@dataclass(frozen=True)
class Machine:
    """The parameters of one start. `console`: file for the kernel's console. `results`: folder to which the guest
    writes. `memory`: MB. `terminal`: the port `out` is a terminal in the guest. All files are in folders of this
    run."""

    image: Image
    initramfs: Path
    console: Path
    results: Path
    memory: int
    cpus: int
    terminal: bool = False

    @property
    def complaints(self) -> Path:
        """The file for the output of the program that runs the machine."""
        return self.console.with_name("complaints")

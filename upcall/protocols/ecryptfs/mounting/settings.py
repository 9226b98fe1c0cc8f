"""The settings of the source that mounts: of its command line. Pure."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class MountSettings(NamedTuple):
    """Of the command line: made by `upcall mounts serve`, passed across exec by upcall/process/settings.py."""

    folder: Path | None = None  # of the socket; None: the system's

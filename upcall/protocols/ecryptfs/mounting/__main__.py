"""Runs the source that mounts: `python -m upcall.protocols.ecryptfs.mounting SETTINGS`, with MountSettings as
upcall/process/settings.py packs them. `upcall mounts serve` becomes this process by exec.
"""

from __future__ import annotations

import sys

from upcall.process import entry
from upcall.protocols.ecryptfs.mounting.process import main
from upcall.protocols.ecryptfs.mounting.settings import MountSettings

if __name__ == "__main__":
    sys.exit(entry.run("upcall mounts serve", MountSettings, sys.argv[1:], main))

"""Runs the quota source: `python -m upcall.protocols.quota SETTINGS`, with SourceSettings as
upcall/process/settings.py packs them. `upcall quota serve` becomes this process by exec.
"""

from __future__ import annotations

import sys

from upcall.process import entry
from upcall.protocols.quota.process import main
from upcall.protocols.quota.settings import SourceSettings

if __name__ == "__main__":
    sys.exit(entry.run("upcall quota serve", SourceSettings, sys.argv[1:], main))

"""Runs the broker: `python -m upcall.broker SETTINGS`, with BrokerSettings as upcall/process/settings.py packs them.

`upcall broker` becomes this process by exec, without the command line's libraries.
"""

from __future__ import annotations

import sys

from upcall.broker.server import main
from upcall.broker.settings import BrokerSettings
from upcall.process import entry

if __name__ == "__main__":
    sys.exit(entry.run("upcall broker", BrokerSettings, sys.argv[1:], main))

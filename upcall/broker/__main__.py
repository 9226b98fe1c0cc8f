"""Starts the broker. `upcall broker` executes this module, to leave the command line's libraries behind: memory."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from upcall.broker.server import main
from upcall.config import ConfigError
from upcall.core.errors import UpcallError
from upcall.process import trust


def run(arguments: list[str]) -> int:
    """`folder=PATH`, `device=PATH`, `contexts=N` and `records=WHERE`, all optional."""
    settings = dict(argument.split("=", 1) for argument in arguments)
    folder, device, contexts = (settings.get(name) for name in ("folder", "device", "contexts"))
    paths = Path(folder) if folder else None, Path(device) if device else None
    try:
        faults = trust.require()
        if faults:
            print(f"upcall broker: others could change what this runs: {faults[0]}", file=sys.stderr)  # noqa: T201
        main(*paths, int(contexts) if contexts else None, settings.get("records"))
    except (UpcallError, OSError) as error:
        print(f"upcall broker: {error}", file=sys.stderr)  # noqa: T201
        return os.EX_CONFIG if isinstance(error, ConfigError) else os.EX_UNAVAILABLE
    return os.EX_OK


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))

"""`python -I -m upcall.protocols.quota [folder=PATH]`: the quota source; `upcall quota serve` becomes this process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from upcall.config import ConfigError
from upcall.core.errors import UpcallError
from upcall.process import trust
from upcall.protocols.quota.process import main


def run(arguments: list[str]) -> int:
    """`folder=PATH`: the broker's, if it is not the system's. Returns the exit status."""
    settings = dict(argument.split("=", 1) for argument in arguments)
    folder = settings.get("folder")
    try:
        faults = trust.require()
        if faults:
            print(f"upcall quota serve: others could change what this runs: {faults[0]}", file=sys.stderr)  # noqa: T201
        main(Path(folder) if folder else None)
    except (UpcallError, OSError) as error:
        print(f"upcall quota serve: {error}", file=sys.stderr)  # noqa: T201
        return os.EX_CONFIG if isinstance(error, ConfigError) else os.EX_UNAVAILABLE
    return os.EX_OK


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))

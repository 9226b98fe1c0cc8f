"""`upcall broker` becomes this process: without the command line's libraries it starts and stays small."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from upcall.broker.server import main
from upcall.errors import UsageError


def run(arguments: list[str]) -> int:
    """`folder=PATH`, `device=PATH` and `contexts=N`, all optional."""
    settings = dict(argument.split("=", 1) for argument in arguments)
    folder, device, contexts = (settings.get(name) for name in ("folder", "device", "contexts"))
    try:
        main(Path(folder) if folder else None, Path(device) if device else None, int(contexts) if contexts else None)
    except (UsageError, OSError) as error:
        print(f"upcall broker: {error}", file=sys.stderr)  # noqa: T201
        return os.EX_UNAVAILABLE
    return os.EX_OK


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))

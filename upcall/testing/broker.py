"""`python -m upcall.testing.broker system=FILE ...`: a broker with a system's configuration of its own."""

from __future__ import annotations

import sys
from pathlib import Path

from upcall import config
from upcall.broker.__main__ import run

if __name__ == "__main__":
    file = Path(sys.argv[1].removeprefix("system="))
    config.SYSTEM, config.VENDOR = file, file.with_name("vendor.toml")  # type: ignore[misc]
    sys.exit(run(sys.argv[2:]))

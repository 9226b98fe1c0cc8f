"""Names what Debian's packages of upcall install: docs/packaging.md."""

from __future__ import annotations

from typing import Final

HOME: Final = "/usr/lib/upcall"  # the interpreter's prefix: modules of upcall, and libraries that Debian lacks
RECORD: Final = f"{HOME}/install.json"  # of the package upcall: a manifest of what it has set up

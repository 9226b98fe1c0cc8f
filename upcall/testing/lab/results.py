"""The folder that the guest writes its results to.

Every user in the guest may write there, which nobody else on the host should: the guest gets a folder inside
a private one, and what it left is moved to its place when the machine has ended."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def staging(results: Path | None) -> Iterator[Path]:
    """Gives the folder for the guest; at the end, however it comes, its contents are in `results` (if
    any)."""
    if results is not None:
        results.mkdir(parents=True, exist_ok=True)
    # Inside `results`, so that moving is renaming.
    private = Path(tempfile.mkdtemp(prefix=".lab-", dir=results))
    writable = private / "results"
    try:
        writable.mkdir()
        writable.chmod(0o1777)
        yield writable
    finally:
        try:
            if results is not None:
                merge(writable, results)
        finally:
            shutil.rmtree(private, ignore_errors=True)


def merge(source: Path, target: Path) -> None:
    """Moves what is in `source` into `target`, replacing what has the same name. Links are moved, not
    followed."""
    for entry in sorted(source.iterdir()):
        place = target / entry.name
        if place.is_dir() and not place.is_symlink():
            if entry.is_dir() and not entry.is_symlink():
                merge(entry, place)
                continue
            shutil.rmtree(place)
        elif entry.is_dir() and not entry.is_symlink():
            place.unlink(missing_ok=True)
        entry.replace(place)

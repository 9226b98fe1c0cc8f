"""Manages the folder to which the guest writes its results.

All users of the guest may write there, but other users of the host must not. So the guest writes to a folder inside a
private one, and its files are moved when the machine has ended."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def staging(results: Path | None) -> Iterator[Path]:
    """A context with the folder for the guest. At its end, also after an exception, moves the content to `results`,
    unless that is None."""
    if results is not None:
        results.mkdir(parents=True, exist_ok=True)
    # Inside `results`, so that files can be renamed.
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
    """Moves the content of `source` into `target`, replacing entries of the same name. Does not follow symbolic
    links."""
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

"""Reads the lines of a log file and follows it, also across rotation."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from upcall.wire.record import MAX_LINE

PAUSE = 0.2  # seconds between two reads at the end of the file


def lines(path: Path, follow: bool = False, pause: float = PAUSE) -> Iterator[str | None]:
    """Yields each line without its end; with `follow`, None at the end of the file. OSError.

    A line longer than any record is yielded in pieces, so that memory stays bounded.
    """
    file: IO[bytes] = path.open("rb")
    try:
        begun = b""
        while True:
            piece = file.readline(MAX_LINE)
            if piece.endswith(b"\n") or len(begun) + len(piece) >= MAX_LINE or (piece and not follow):
                yield (begun + piece).decode("utf-8", "backslashreplace").rstrip("\n")
                begun = b""
                continue
            begun += piece
            if piece:
                continue
            if not follow:
                return
            if new := _rotated(path, file):
                file.close()
                file, begun = new, b""
                continue
            yield None
            time.sleep(pause)
    finally:
        file.close()


def _rotated(path: Path, file: IO[bytes]) -> IO[bytes] | None:
    """Returns the file that has this path now if it is another one, or the same reopened if it was truncated."""
    here = os.fstat(file.fileno())
    try:
        there = path.stat()
        if (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino) and there.st_size >= file.tell():
            return None
        return path.open("rb")
    except FileNotFoundError:
        return None  # it is about to be created

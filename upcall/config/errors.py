"""Defines the error of a faulty configuration, with its place."""

from __future__ import annotations

from pathlib import Path

from upcall.core.errors import UpcallError


class ConfigError(UpcallError):
    """A faulty configuration file: its path, the line if known, the key, and the reason."""

    def __init__(self, file: Path, why: str, line: int | None = None, key: str = "") -> None:
        self.file, self.why, self.line, self.key = file, why, line, key
        place = str(file) if line is None else f"{file}:{line}"
        super().__init__(f"{place}: {key}: {why}" if key else f"{place}: {why}")

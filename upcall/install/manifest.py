"""Records which files upcall has installed, so that no others are changed or removed."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path
from typing import Any, Final, NamedTuple

from upcall.config import ConfigError

FILE: Final = "/var/lib/upcall/install.json"


class Manifest(NamedTuple):
    """The record of an installation."""

    kind: str = ""  # of upcall.install.wanted; "": nothing is installed
    files: dict[str, str] = {}  # path -> SHA-256 of the written content
    folders: tuple[str, ...] = ()  # folders that were created
    request_key: bool = False  # whether request-key's configuration was changed
    settled: bool = False  # whether the service manager's commands have succeeded


def digest(data: bytes) -> str:
    """Returns the SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def read(path: Path) -> Manifest:
    """Reads the record; returns an empty one if there is none. ConfigError if it is malformed."""
    try:
        fields: Any = json.loads(path.read_bytes())
        found = Manifest(
            str(fields["kind"]),
            {str(name): str(value) for name, value in fields["files"].items()},
            tuple(map(str, fields["folders"])),
            bool(fields["request_key"]),
            bool(fields["settled"]),
        )
    except FileNotFoundError:
        return Manifest()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(path, f"is not as upcall wrote it: {error}") from None
    if not all(name.startswith("/") and ".." not in name.split("/") for name in (*found.files, *found.folders)):
        raise ConfigError(path, "names a path that upcall would not write")
    return found


def shown(manifest: Manifest) -> bytes:
    """Returns the record as JSON."""
    return json.dumps(manifest._asdict(), indent=2).encode() + b"\n"


def is_ours(manifest: Manifest, path: str, data: bytes) -> None:
    """FileExistsError unless upcall wrote this file and it was not changed since."""
    if path not in manifest.files:
        raise FileExistsError(errno.EEXIST, "is there, and was not made by upcall: move it away", path)
    if manifest.files[path] != digest(data):
        raise FileExistsError(errno.EEXIST, "was edited since upcall made it: move it away, or use a drop-in", path)

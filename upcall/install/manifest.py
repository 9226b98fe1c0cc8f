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
    kind: str = ""  # of upcall.install.wanted; "": nothing is installed
    files: dict[str, str] = {}  # path -> SHA-256 of what we wrote
    folders: tuple[str, ...] = ()  # that we made
    request_key: bool = False  # we have put our lines into request-key's configuration
    settled: bool = False  # the service manager was told


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read(path: Path) -> Manifest:
    """An empty one if there is none. ConfigError if it is nonsense."""
    try:
        told: Any = json.loads(path.read_bytes())
        found = Manifest(
            str(told["kind"]),
            {str(name): str(value) for name, value in told["files"].items()},
            tuple(map(str, told["folders"])),
            bool(told["request_key"]),
            bool(told["settled"]),
        )
    except FileNotFoundError:
        return Manifest()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(path, f"is not as upcall wrote it: {error}") from None
    if not all(name.startswith("/") and ".." not in name.split("/") for name in (*found.files, *found.folders)):
        raise ConfigError(path, "names a path that upcall would not write")
    return found


def shown(manifest: Manifest) -> bytes:
    return json.dumps(manifest._asdict(), indent=2).encode() + b"\n"


def is_ours(manifest: Manifest, path: str, data: bytes) -> None:
    """FileExistsError unless we wrote this, and nobody has changed it."""
    if path not in manifest.files:
        raise FileExistsError(errno.EEXIST, "is there, and was not made by upcall: move it away", path)
    if manifest.files[path] != digest(data):
        raise FileExistsError(errno.EEXIST, "was edited since upcall made it: move it away, or use a drop-in", path)

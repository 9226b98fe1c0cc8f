"""Lists the configuration's files in order, and checks that other users cannot write them."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final, NamedTuple

from upcall.config.errors import ConfigError
from upcall.config.table import SYSTEM, USERS

MAX_FILE: Final = 1 << 20  # bytes
SUFFIX: Final = ".toml"  # of drop-ins; other files in their folder are ignored

_NULL: Final = Path(os.devnull)
# NONBLOCK: opening a FIFO must not hang.
_OPEN: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK


class Source(NamedTuple):
    """A configuration file, which may not exist."""

    file: Path
    scope: str  # SYSTEM or USERS
    masked: Path | None = None  # what replaces it: a file of the same name, or /dev/null
    problem: ConfigError | None = None  # if it is a folder that cannot be read


def sources(vendor: Path, system: Path, user: Path | None) -> list[Source]:
    """Returns the files in order of increasing priority: each place's file, then its drop-ins by name.

    As with systemd, a drop-in of the system's masks the vendor's of the same name, and a link to /dev/null only masks.
    """
    ours, theirs = _drop_ins(system, SYSTEM), _drop_ins(vendor, SYSTEM)
    masks = {source.file.name: source.file for source in ours if source.problem is None}
    theirs = [source._replace(masked=masks.get(source.file.name, source.masked)) for source in theirs]
    found = [Source(vendor, SYSTEM), *theirs, Source(system, SYSTEM), *ours]
    return found if user is None else [*found, Source(user, USERS), *_drop_ins(user, USERS)]


def folder_of(file: Path) -> Path:
    """Returns the folder of a configuration file's drop-ins."""
    return file.with_name(f"{file.name}.d")


def _drop_ins(file: Path, scope: str) -> list[Source]:
    folder = folder_of(file)
    try:
        fd = os.open(folder, _OPEN)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        return [Source(folder, scope, problem=_unreadable(folder, error))]
    try:
        found = os.fstat(fd)
        if not stat.S_ISDIR(found.st_mode):
            raise ConfigError(folder, "is not a folder")
        _check_owner(folder, found)
        names = sorted(os.listdir(fd))  # noqa: PTH208 - of the folder that was checked
    except ConfigError as error:
        return [Source(folder, scope, problem=error)]
    except OSError as error:
        return [Source(folder, scope, problem=_unreadable(folder, error))]
    finally:
        os.close(fd)
    named = [name for name in names if name.endswith(SUFFIX) and not name.startswith(".")]
    return [_drop_in(folder / name, scope) for name in named]


def _drop_in(file: Path, scope: str) -> Source:
    return Source(file, scope, _NULL if file.is_symlink() and file.resolve() == _NULL else None)


def read(file: Path) -> str | None:
    """Returns a file's text; None if it does not exist. ConfigError if it cannot be read, or others could have written
    it."""
    try:
        fd = os.open(file, _OPEN)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unreadable(file, error) from None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(file, "is not a regular file")
        _check_owner(file, found)
        if found.st_size > MAX_FILE:
            raise ConfigError(file, f"{found.st_size} bytes, at most {MAX_FILE} are allowed")
        with os.fdopen(fd, "rb", closefd=False) as opened:
            data = opened.read(MAX_FILE)
    except OSError as error:
        raise _unreadable(file, error) from None
    finally:
        os.close(fd)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(file, f"is not UTF-8 at byte {error.start}", line) from None


def _unreadable(file: Path, error: OSError) -> ConfigError:
    return ConfigError(file, f"cannot be read: {error.strerror}")


def _check_owner(file: Path, found: os.stat_result) -> None:
    """Checks the opened file, not its path, so that it cannot be swapped in between."""
    if found.st_uid not in (0, os.geteuid()):
        raise ConfigError(file, f"belongs to uid {found.st_uid}, not to root or to you")
    if found.st_mode & 0o022:
        raise ConfigError(file, f"mode {stat.S_IMODE(found.st_mode):04o} lets others write to it, chmod go-w it")

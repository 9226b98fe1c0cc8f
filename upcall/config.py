"""The configuration: a system's TOML file, and the user's own, which can narrow it but never widen it.

    # /etc/upcall/config.toml, then $XDG_CONFIG_HOME/upcall/config.toml (~/.config/upcall/config.toml)
    [plugins]
    allow = ["openssl", "x25519"]     # the only ones that are loaded; without this line, all that are installed

A file that somebody else could have written is an error, and so is a key that nobody knows: a misspelt `allow` must
not mean "all".
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from upcall.errors import UpcallError

SYSTEM: Final = Path("/etc/upcall/config.toml")
MAX_FILE: Final = 1 << 20  # bytes

_OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK  # NONBLOCK: opening a FIFO must not hang


class ConfigError(UpcallError):
    """A configuration file that cannot be followed; the text names the file, and the key or line in it."""

    def __init__(self, file: Path, why: str) -> None:
        self.file, self.why = file, why
        super().__init__(f"{file}: {why}")


class Config(NamedTuple):
    """What all files say together."""

    allow: frozenset[str] | None = None  # aliases of plugins; None: all
    sources: tuple[Path, ...] = ()  # the files that name what is allowed

    def allows(self, alias: str) -> bool:
        return self.allow is None or alias in self.allow

    def refusal(self, alias: str) -> str:
        """Why a plugin that is not allowed is not loaded, for people."""
        files = " and ".join(str(file) for file in self.sources)
        return f"the plugin {alias!r} is installed, but not allowed: it is not named by [plugins] allow in {files}"


def load() -> Config:
    """The system's configuration, narrowed by the user's. ConfigError; a file that is not there says nothing."""
    config = Config()
    for file in (SYSTEM, user_file()):
        config = _narrowed(config, file, _read(file))
    return config


def user_file() -> Path:
    """Where the user's own configuration is, if there is one."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".config") / "upcall" / "config.toml"


def _narrowed(config: Config, file: Path, told: Mapping[str, Any]) -> Config:
    """Every table that is known is taken out; what is left is an error."""
    values = _checked(file, told, _TABLES, "")
    allow = values.get("plugins", {}).get("allow")
    if allow is None:
        return config
    both = allow if config.allow is None else config.allow & allow
    return config._replace(allow=both, sources=(*config.sources, file))


def _names(value: object) -> frozenset[str]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ValueError("a list of names is wanted")
    return frozenset(value)


# Tables by name; in them, what checks and converts each key's value, with a ValueError for people.
_Check = Callable[[object], Any]
_TABLES: Final[dict[str, dict[str, _Check]]] = {"plugins": {"allow": _names}}


def _checked(file: Path, told: Mapping[str, Any], known: Mapping[str, Any], above: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in told.items():
        path = f"{above}{key}"
        if key not in known:
            raise ConfigError(file, f"{path}: unknown; {', '.join(above + one for one in known)} can be set here")
        check = known[key]
        if isinstance(check, dict):
            if not isinstance(value, dict):
                raise ConfigError(file, f"{path}: a table is wanted")
            values[key] = _checked(file, value, check, f"{path}.")
            continue
        try:
            values[key] = check(value)
        except ValueError as error:
            raise ConfigError(file, f"{path}: {error}") from None
    return values


def _read(file: Path) -> dict[str, Any]:
    try:
        fd = os.open(file, _OPEN)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    with os.fdopen(fd, "rb") as opened:
        _check_owner(file, os.fstat(fd))
        data = opened.read(MAX_FILE)
    import tomllib  # only who has a configuration pays for it

    try:
        return tomllib.loads(data.decode())
    except UnicodeDecodeError as error:
        raise ConfigError(file, f"is not UTF-8 at byte {error.start}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(file, str(error)) from None  # it says line and column


def _check_owner(file: Path, found: os.stat_result) -> None:
    """Checked on the opened file, so that nobody can swap it in between."""
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(file, "is not a regular file")
    if found.st_uid not in (0, os.geteuid()):
        raise ConfigError(file, f"belongs to uid {found.st_uid}, who is neither root nor you")
    if found.st_mode & 0o022:
        raise ConfigError(file, f"mode {stat.S_IMODE(found.st_mode):04o} lets others write to it, chmod go-w it")
    if found.st_size > MAX_FILE:
        raise ConfigError(file, f"{found.st_size} bytes, at most {MAX_FILE} are allowed")

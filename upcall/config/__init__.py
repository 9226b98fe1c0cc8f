"""Reads the configuration: TOML files of the vendor, the system and the user, merged key by key.

    /usr/lib/upcall/config.toml, and config.toml.d/*.toml beside it, by name
    /etc/upcall/config.toml, likewise: a drop-in masks the one of the same name in /usr/lib
    $XDG_CONFIG_HOME/upcall/config.toml (~/.config/upcall/config.toml), likewise

A later file replaces values of earlier ones, whole lists included. The list of plugins is an exception: a user's own
files can narrow the system's list, never widen it. `keys` defines the keys, and which of them a user can set.

A file that another user could have written is an error, and so is an unknown key: a misspelt `allow` must not mean
"all".

Most of the package is imported only when the configuration is read, which a daemon rarely does.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from upcall.config.errors import ConfigError as ConfigError

if TYPE_CHECKING:
    from upcall.config.layers import Said

VENDOR: Final = Path("/usr/lib/upcall/config.toml")
SYSTEM: Final = Path("/etc/upcall/config.toml")


class Config(NamedTuple):
    """The plugins that the configuration allows."""

    allow: frozenset[str] | None = None  # aliases of plugins; None: all
    sources: tuple[Path, ...] = ()  # the files that set the list

    def allows(self, alias: str) -> bool:
        """Returns whether the plugin of this alias may be loaded."""
        return self.allow is None or alias in self.allow

    def refusal(self, alias: str) -> str:
        """Explains to people why a plugin is not loaded."""
        files = " and ".join(str(file) for file in self.sources)
        return f"the plugin {alias!r} is installed, but not allowed: it is not named by [plugins] allow in {files}"


def load() -> Config:
    """Returns the plugins that the system's configuration allows, narrowed by the user's. ConfigError. Missing files
    are ignored."""
    from upcall.config.layers import laid_over

    setting = laid_over(read(user=True)).get(("plugins", "allow"))
    return Config() if setting is None else Config(setting.value, tuple(said.source.file for said in setting.by))


def settings(table: str, user: bool = False) -> dict[str, Any]:
    """Returns the checked values of one table; otherwise as `tables`."""
    found: dict[str, Any] = tables(user).get(table, {})
    return found


def tables(user: bool = False) -> dict[str, Any]:
    """Returns the checked values of all tables, without defaults: of the system's files, with `user` overridden by the
    user's own. ConfigError."""
    from upcall.config.layers import nested

    return nested(read(user))


def read(user: bool) -> list[Said]:
    """Returns all files in order of increasing priority. ConfigError: the first error found."""
    files = look(user)
    for said in files:
        if said.problems:
            raise said.problems[0]
    return files


def look(user: bool) -> list[Said]:
    """Returns the same, with all errors in `problems`, for `upcall config check`."""
    from upcall.config.files import sources
    from upcall.config.layers import Said

    return [Said(source) for source in sources(VENDOR, SYSTEM, user_file() if user else None)]


def blame(path: tuple[str, ...], why: str) -> ConfigError:
    """Makes an error about a value of the system's configuration that only its user can check, with the file and line
    that set it."""
    from upcall.config.layers import laid_over
    from upcall.config.lines import spelled

    setting = laid_over(read(user=False)).get(path)
    return ConfigError(SYSTEM, why, None, spelled(path)) if setting is None else setting.by[-1].error(path, why)


def user_file() -> Path:
    """Returns the path of the user's own configuration, which may not exist."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".config") / "upcall" / "config.toml"

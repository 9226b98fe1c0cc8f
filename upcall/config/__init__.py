"""Reads the configuration: TOML files of the vendor, the system and the user, merged key by key.

    /usr/lib/upcall/config.toml, and config.toml.d/*.toml beside it, by name
    /etc/upcall/config.toml, likewise: a drop-in masks the one of the same name in /usr/lib
    $XDG_CONFIG_HOME/upcall/config.toml (~/.config/upcall/config.toml), likewise

A later file replaces what an earlier one says, lists and all. The list of plugins is different: a user's own files
can narrow the system's, never widen it. Which keys there are, and which of them a user can set, is in `keys`.

A file that somebody else could have written is an error, and so is a key that nobody knows: a misspelt `allow` must
not mean "all".

Most of this is imported when the configuration is read, and a daemon seldom reads it.
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
    """Which plugins all files together allow."""

    allow: frozenset[str] | None = None  # aliases of plugins; None: all
    sources: tuple[Path, ...] = ()  # the files that name what is allowed

    def allows(self, alias: str) -> bool:
        return self.allow is None or alias in self.allow

    def refusal(self, alias: str) -> str:
        """Why a plugin that is not allowed is not loaded, for people."""
        files = " and ".join(str(file) for file in self.sources)
        return f"the plugin {alias!r} is installed, but not allowed: it is not named by [plugins] allow in {files}"


def load() -> Config:
    """What the system's configuration allows, narrowed by the user's. ConfigError; a file that is not there says
    nothing."""
    from upcall.config.layers import laid_over

    setting = laid_over(read(user=True)).get(("plugins", "allow"))
    return Config() if setting is None else Config(setting.value, tuple(said.source.file for said in setting.by))


def settings(table: str, user: bool = False) -> dict[str, Any]:
    """The checked values of one table, as `tables` has it."""
    found: dict[str, Any] = tables(user).get(table, {})
    return found


def tables(user: bool = False) -> dict[str, Any]:
    """The checked values of all tables, without defaults: of the system's files, and with `user` those of the user's
    own laid over them. ConfigError."""
    from upcall.config.layers import nested

    return nested(read(user))


def read(user: bool) -> list[Said]:
    """Every file that counts, in the order in which they are laid over each other. ConfigError, the first there is."""
    files = look(user)
    for said in files:
        if said.problems:
            raise said.problems[0]
    return files


def look(user: bool) -> list[Said]:
    """The same with all that is wrong, for `upcall config check`."""
    from upcall.config.files import sources
    from upcall.config.layers import Said

    return [Said(source) for source in sources(VENDOR, SYSTEM, user_file() if user else None)]


def blame(path: tuple[str, ...], why: str) -> ConfigError:
    """An error of the system's configuration that only its reader can find, with the file and line that say so."""
    from upcall.config.layers import laid_over
    from upcall.config.lines import spelled

    setting = laid_over(read(user=False)).get(path)
    return ConfigError(SYSTEM, why, None, spelled(path)) if setting is None else setting.by[-1].error(path, why)


def user_file() -> Path:
    """Where the user's own configuration is, if there is one."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".config") / "upcall" / "config.toml"

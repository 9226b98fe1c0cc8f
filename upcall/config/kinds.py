"""Defines the kinds of values in the configuration: each describes, checks and converts a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple


class Kind(NamedTuple):
    """A kind of value. `wanted`: describes it. `take(value)`: returns the converted value, or raises ValueError, whose
    text may be empty."""

    wanted: str
    take: Callable[[object], Any]

    def checked(self, value: object) -> Any:
        """Returns the converted value. ValueError, with a text that says what is expected."""
        try:
            return self.take(value)
        except ValueError as error:
            raise ValueError(str(error) or f"must be {self.wanted}") from None


def _names(value: object) -> frozenset[str]:
    return frozenset(_list_of_names(value))


def _list_of_names(value: object) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
        raise ValueError
    return value


def _names_in_order(value: object) -> tuple[str, ...]:
    names = _list_of_names(value)
    if len(set(names)) < len(names):
        raise ValueError("names an entry twice")
    return tuple(names)


def _users_and_groups(value: object) -> tuple[str, ...]:
    names = _names_in_order(value)
    if wrong := [name for name in names if not name.removeprefix("@") or "\0" in name or ":" in name]:
        raise ValueError(f"{wrong[0]!r} is no name of a user, nor @ and the name of a group")
    return names


def _command(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(one, str) and "\0" not in one for one in value):
        raise ValueError("must be a program and its arguments, as a list")
    return tuple(value)


def _user(value: object) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError
    return value


def _path(value: object) -> str:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise ValueError("must be an absolute path, beginning with /")
    return value


def _places(value: object) -> frozenset[str]:
    if not isinstance(value, list):
        raise ValueError
    return frozenset("~" if one == "~" else _path_or_home(one) for one in value)


def _path_or_home(value: object) -> str:
    if isinstance(value, str) and value.startswith("~/") and "\0" not in value:
        return value
    return _path(value)


def _where(value: object) -> str:
    if value in ("stderr", "journal"):
        return str(value)
    try:
        return _path(value)
    except ValueError:
        raise ValueError("must be stderr, journal or the absolute path of a file") from None


def _secret(value: object) -> str:
    if not isinstance(value, str) or not value or "\0" in value or value in (".", ".."):
        raise ValueError("must be the absolute path of a private file, or the name of a systemd credential")
    return value if "/" not in value else _path(value)


def _printable(value: object) -> str:
    if not isinstance(value, str) or not value or not value.isprintable() or value != value.strip():
        raise ValueError
    return value


def _yes_or_no(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _url(value: object) -> str:
    from urllib.parse import urlsplit  # imported only for webhooks

    if not isinstance(value, str) or not value.isascii() or not value.isprintable() or " " in value:
        raise ValueError("must be a URL, in ASCII and without blanks")
    try:
        parts = urlsplit(value)
        host, _ = parts.hostname or "", parts.port  # urlsplit checks the port only on access
    except ValueError as error:
        raise ValueError(f"is no URL: {error}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError("must be a URL that begins with https:// and a host")
    if parts.scheme == "http" and not on_this_machine(host):
        raise ValueError("http is for this machine only (127.0.0.1), use https")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not contain a name or a password")
    return value


def on_this_machine(host: str) -> bool:
    """Returns whether this host is this machine without asking DNS: "localhost", or a loopback address."""
    from ipaddress import ip_address

    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


NAMES: Final = Kind("a list of names", _names)
NAMES_IN_ORDER: Final = Kind("a list of names", _names_in_order)
USERS_AND_GROUPS: Final = Kind("a list of names of users, and of groups after @", _users_and_groups)
COMMAND: Final = Kind("a program and its arguments, as a list", _command)
USER: Final = Kind("the name of a user", _user)
PLACES: Final = Kind("a list of absolute paths, or of paths that begin with ~/", _places)
PATH: Final = Kind("an absolute path", _path)
WHERE: Final = Kind("stderr, journal or the absolute path of a file", _where)
SECRET: Final = Kind("the absolute path of a private file, or the name of a systemd credential", _secret)
PRINTABLE: Final = Kind("a text of printable characters", _printable)
YES_OR_NO: Final = Kind("true or false", _yes_or_no)
URL: Final = Kind("a URL", _url)
ANYTHING: Final = Kind("whatever its reader knows", lambda value: value)


def one_of(*choices: str) -> Kind:
    """One of these texts."""
    wanted = f"one of {', '.join(choices)}"

    def take(value: object) -> str:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{value!r}; must be {wanted}")
        return value

    return Kind(wanted, take)


def some_of(*choices: str) -> Kind:
    """A list of some of these texts, none twice."""
    wanted = f"a list of some of {', '.join(choices)}"

    def take(value: object) -> tuple[str, ...]:
        names = _names_in_order(value)
        if unknown := [name for name in names if name not in choices]:
            raise ValueError(f"{unknown[0]!r}; must be {wanted}")
        return names

    return Kind(wanted, take)


def number(least: float, most: float) -> Kind:
    """A number within these bounds."""

    def take(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise ValueError
        return value

    return Kind(f"a number from {least:.10g} to {most:.10g}", take)


def whole(least: int, most: int) -> Kind:
    """A whole number within these bounds."""

    def take(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError
        return value

    return Kind(f"a whole number from {least} to {most}", take)


def ascending(each: Kind, wanted: str) -> Kind:
    """A list of numbers, returned sorted and without repetitions."""

    def take(value: object) -> tuple[int, ...]:
        if not isinstance(value, list):
            raise ValueError
        return tuple(sorted({each.checked(one) for one in value}))

    return Kind(wanted, take)

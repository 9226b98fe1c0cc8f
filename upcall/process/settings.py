"""Passes a process's settings across exec as one argument: a typed tuple as JSON, checked by field and type.

Fields that have their default are left out, so that `ps` shows what differs. The text is ASCII in every locale. All
users can read the arguments of a process: settings that hold anything private are handed over in a sealed memfd, whose
descriptor N is the argument `@N`. No secrets belong into either.

A settings class is a NamedTuple whose fields are bool, int, float, str, Path, `X | None`, `tuple[X, ...]`, or another
such class.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Final, TypeVar

from upcall.core.errors import UpcallError, UsageError

MAX: Final = 0x1FFFF  # characters: the kernel passes no longer argument (MAX_ARG_STRLEN, execve(2))
_SHOWN: Final = 60  # characters of a wrong value in an error
_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_DESCRIPTOR: Final = re.compile(r"@([0-9]{1,9})", re.ASCII)
_WANTED: Final[dict[object, str]] = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a string without NUL",
    Path: "a path",
}
T = TypeVar("T", bound=tuple[Any, ...])


def dumps(settings: tuple[Any, ...]) -> str:
    """Returns `settings` as the text that `loads` takes. UsageError if it would refuse that."""
    text = json.dumps(_plain(settings), separators=(",", ":"))
    loads(type(settings), text)
    return text


def loads(kind: type[T], text: str) -> T:
    """Returns the settings, an instance of `kind`. Absent fields have their default. UsageError with the name of the
    field that is unknown, missing, given twice, or of a wrong type."""
    if len(text) > MAX:
        raise UsageError(f"settings: {len(text)} characters, at most {MAX} are allowed")
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"settings: not JSON: {error}") from None
    checked: T = _checked(kind, value, "")
    return checked


def handed_over(settings: tuple[Any, ...]) -> str:
    """Puts the text of `settings` into a sealed memfd that is inherited across exec. Returns the argument `@N` for
    `of_arguments`. UsageError as `dumps`; UpcallError if there can be no memfd."""
    text = dumps(settings).encode("ascii")
    fd = -1
    try:
        fd = os.memfd_create("settings", os.MFD_ALLOW_SEALING)  # without MFD_CLOEXEC
        if os.write(fd, text) < len(text):
            raise OSError("the memfd took only a part")
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        raise UpcallError(f"the settings cannot be handed over in memory: {error.strerror or error}") from error
    return f"@{fd}"


def of_arguments(kind: type[T], arguments: Sequence[str]) -> T:
    """Returns the settings from a process's arguments: one, or none for defaults. An argument `@N` is read from the
    descriptor N, which is closed. UsageError."""
    if len(arguments) > 1:
        raise UsageError(f"settings: {len(arguments)} arguments, at most one is allowed")
    text = arguments[0] if arguments else "{}"
    return loads(kind, _taken(text) if text.startswith("@") else text)


def _taken(argument: str) -> str:
    """Returns the text in the sealed memfd that `argument` names."""
    shown = ascii(argument[:_SHOWN])
    if not (match := _DESCRIPTOR.fullmatch(argument)):
        raise UsageError(f"settings: {shown}: @ and the number of a descriptor is needed")
    fd = int(match[1])
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)  # EINVAL unless it is a memfd: a pipe could block
        if seals & _SEALS != _SEALS:
            raise UsageError(f"settings: {shown}: the memfd is not sealed")
        data = os.pread(fd, MAX + 1, 0)
    except OSError as error:
        raise UsageError(f"settings: {shown}: not a sealed memfd: {error.strerror}") from None
    os.close(fd)
    if len(data) > MAX:
        raise UsageError(f"settings: {shown}: more than {MAX} bytes")
    try:
        return data.decode("ascii")
    except UnicodeDecodeError:
        raise UsageError(f"settings: {shown}: not ASCII") from None


def _plain(value: Any) -> Any:
    if hasattr(value, "_fields"):
        defaults = value._field_defaults
        fields = value._asdict().items()
        return {name: _plain(one) for name, one in fields if name not in defaults or one != defaults[name]}
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(name for number, (name, _) in enumerate(pairs) if name in dict(pairs[:number]))
        raise UsageError(f"settings: {twice[:_SHOWN]!r} is given twice")
    return fields


def _checked(kind: Any, value: Any, where: str) -> Any:
    """Returns `value` as a `kind`. `where`: the field's name, with those around it, for errors."""
    if hasattr(kind, "_fields"):
        return _record(kind, value, where)
    if isinstance(kind, UnionType):  # X | None
        return None if value is None else _checked(typing.get_args(kind)[0], value, where)
    if typing.get_origin(kind) is tuple:
        if type(value) is not list:
            raise _wrong(where, "a list", value)
        return tuple(_checked(typing.get_args(kind)[0], one, f"{where}[{n}]") for n, one in enumerate(value))
    if kind is Path and type(value) is str and "\0" not in value:
        return Path(value)
    if kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)) or (kind is str and "\0" in value):
        raise _wrong(where, _WANTED[kind], value)
    return value


def _record(kind: Any, value: Any, where: str) -> Any:
    if type(value) is not dict:
        raise _wrong(where, "an object", value)
    within = f"{where}." if where else ""
    if unknown := [name for name in value if name not in kind._fields]:
        raise UsageError(f"settings: {within}{unknown[0][:_SHOWN]!s}: no such field")
    if missing := [name for name in kind._fields if name not in value and name not in kind._field_defaults]:
        raise UsageError(f"settings: {within}{missing[0]}: is missing")
    types = typing.get_type_hints(kind)
    return kind(**{name: _checked(types[name], one, within + name) for name, one in value.items()})


def _wrong(where: str, wanted: str, value: Any) -> UsageError:
    shown = repr(value)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
    return UsageError(f"settings: {where or 'all of it'}: {wanted} is needed, not {shown}")

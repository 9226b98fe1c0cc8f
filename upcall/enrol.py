"""What is checked when a key is enrolled, whatever module keeps it: what was chosen for it, and that it works."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from upcall.errors import ModuleFailed, UsageError
from upcall.keymodule import KeyHandle, Limits, Parameter

_SIZES = (1, 16, 32)  # bytes; and the longest that the caller may hand over
_CHANCE = 8  # a clear key as short as this may stand in its wrapped form by chance


def chosen(parameters: Sequence[Parameter], given: Mapping[str, str]) -> dict[str, str]:
    """The value of every parameter, defaults filled in. UsageError for an unknown name, a missing or wrong value."""
    known = {parameter.name: parameter for parameter in parameters}
    for name in given:
        if name not in known:
            raise UsageError(f"there is no parameter {name!r}: {', '.join(known) or 'none'} can be given here")
    values = {}
    for parameter in parameters:
        value = given.get(parameter.name, parameter.default)
        if value is None:
            raise UsageError(f"the parameter {parameter.name!r} must be given: {parameter.help}")
        if parameter.choices and value not in parameter.choices:
            shown = parameter.name if parameter.secret else f"{parameter.name}={value}"
            raise UsageError(f"{shown}: {', '.join(parameter.choices)} can be chosen")
        values[parameter.name] = value
    return values


def prove(handle: KeyHandle, limits: Limits) -> None:
    """Random keys of several sizes, there and back. ModuleFailed says what a key that fails did wrong.

    Made before anything is encrypted with the key: the kernel believes whatever it is given, and a file whose
    wrapped key cannot be unwrapped is lost.
    """
    for size in sorted({*_SIZES, limits.key}):
        if size <= limits.key:
            _prove(handle, os.urandom(size), limits)


def _prove(handle: KeyHandle, clear: bytes, limits: Limits) -> None:
    what = f"the key is not fit for use: of {len(clear)} bytes"
    wrapped = handle.wrap(clear)
    if not isinstance(wrapped, bytes):
        raise ModuleFailed(f"{what} it made no bytes but {type(wrapped).__name__}")
    if not len(clear) <= len(wrapped) <= limits.wrapped:
        raise ModuleFailed(f"{what} it made {len(wrapped)}, {len(clear)} to {limits.wrapped} are possible")
    if wrapped == clear or (len(clear) > _CHANCE and clear in wrapped):
        raise ModuleFailed(f"{what} it left what it should wrap in clear")
    if handle.unwrap(wrapped) != clear:
        raise ModuleFailed(f"{what} it unwrapped something else than it had wrapped")

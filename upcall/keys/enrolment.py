"""Checks a key when it is enrolled, for all key modules: its parameters, and that it wraps and unwraps."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

from upcall.core.errors import ModuleFailed, Refused, UsageError
from upcall.keymodule import (
    Closable,
    Enrolled,
    KeyHandle,
    KeyImporter,
    KeyMaker,
    KeyModule,
    Limits,
    Making,
    Parameter,
    Secrets,
)

_SIZES = (1, 16, 32)  # bytes; besides, the longest key that the caller may pass
_CHANCE = 8  # bytes: a clear key up to this size may occur in its wrapped form by chance


def check_known(parameters: Sequence[Parameter], names: Iterable[str]) -> None:
    """UsageError if a name is not that of a parameter; it lists the parameters."""
    known = [parameter.name for parameter in parameters]
    for name in names:
        if name not in known:
            raise UsageError(f"there is no parameter {name!r}: {', '.join(known) or 'none'} can be given here")


def chosen(parameters: Sequence[Parameter], given: Mapping[str, str]) -> dict[str, str]:
    """Returns the value of every parameter by name, with defaults for those not given. UsageError if a name is
    unknown, or a value is missing or not a valid choice."""
    check_known(parameters, given)
    values = {}
    for parameter in parameters:
        value = given.get(parameter.name, parameter.default)
        if value is None:
            raise UsageError(f"the parameter {parameter.name!r} must be given: {parameter.help}")
        if parameter.choices and value not in parameter.choices and (value or parameter.default != ""):
            shown = parameter.name if parameter.secret else f"{parameter.name}={value}"
            raise UsageError(f"{shown}: {', '.join(parameter.choices)} can be chosen")
        values[parameter.name] = value
    return values


def take_in(importer: KeyImporter, making: Making) -> Enrolled:
    """Imports a key. Prompts for its passphrase only after the module has found that it needs one. Otherwise the
    source is "none", whatever `making` says. ModuleFailed, Refused, UsageError of the module."""
    try:
        return importer.import_key(making._replace(passphrase=bytearray(), source="none"))
    except Refused as refused:
        if refused.reason != "locked" or (isinstance(importer, KeyMaker) and not importer.takes_passphrase):
            raise
    passphrase = making.secrets.passphrase("ask")
    try:
        return importer.import_key(making._replace(passphrase=passphrase))
    finally:
        passphrase[:] = bytes(len(passphrase))


def open_and_prove(module: KeyModule, enrolled: Enrolled, secrets: Secrets, limits: Limits) -> None:
    """Opens the key as the daemon does, checks it by `prove`, and closes it. ModuleFailed, Refused."""
    handle = module.open(enrolled.signature, enrolled.blob, secrets)
    try:
        prove(handle, limits)
    finally:
        if isinstance(handle, Closable):
            handle.close()


def prove(handle: KeyHandle, limits: Limits) -> None:
    """Wraps and unwraps random keys of several sizes. ModuleFailed names what is wrong.

    Must run before a file is encrypted with the key: the kernel does not check wrapped keys, and a file whose wrapped
    key cannot be unwrapped is lost.
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
    if len(clear) > _CHANCE and clear in wrapped:
        raise ModuleFailed(f"{what} it left what it should wrap in clear")
    if handle.unwrap(wrapped) != clear:
        raise ModuleFailed(f"{what} it unwrapped something else than it had wrapped")

"""Defines the command line options for a key's passphrase, and obtains it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click

from upcall.cli.parameter_types import DESCRIPTOR
from upcall.core.errors import UsageError
from upcall.keys.passphrase import PATIENCE, fetch_from_keyring, from_fd, from_file, from_terminal


class Given(NamedTuple):
    """The options as given on the command line."""

    fd: int | None
    file: Path | None
    keyring: bool
    pin_fd: int | None = None
    pin_file: Path | None = None

    def any(self) -> bool:
        """Returns whether there is an option for a passphrase; those for a PIN do not count."""
        return self.fd is not None or self.file is not None or self.keyring

    def any_pin(self) -> bool:
        return self.pin_fd is not None or self.pin_file is not None

    def pin(self) -> bytearray:
        """Reads the PIN that the options specify; the caller wipes it. UsageError, OSError."""
        if self.pin_fd is not None:
            return from_fd(self.pin_fd)
        return from_file(self.pin_file or "")

    def source(self) -> str:
        """The source of a new key's passphrase, as stored in its auth token."""
        if self.keyring:
            return "keyring"
        return "ask" if self.file is None else f"file:{os.path.abspath(self.file)}"  # noqa: PTH100 - resolve() follows links


def passphrase_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that adds the options of a command that uses a key; passes them as one argument, `given`."""

    @functools.wraps(command)
    def with_given(
        passphrase_fd: int | None,
        passphrase_file: Path | None,
        pin_fd: int | None,
        pin_file: Path | None,
        passphrase_keyring: bool = False,
        **rest: Any,
    ) -> Any:
        if passphrase_file is not None and (passphrase_fd is not None or passphrase_keyring):
            raise UsageError("--passphrase-file goes with no other --passphrase option")
        if pin_file is not None and pin_fd is not None:
            raise UsageError("--pin-file goes with no other --pin option")
        check_descriptors(("--passphrase-fd", passphrase_fd), ("--pin-fd", pin_fd))
        return command(given=Given(passphrase_fd, passphrase_file, passphrase_keyring, pin_fd, pin_file), **rest)

    return _FD(_FILE(_PIN_FD(_PIN_FILE(with_given))))


def check_descriptors(*given: tuple[str, int | None]) -> None:
    """UsageError if two options name the same descriptor: each is read to its end."""
    seen: dict[int, str] = {}
    for option, number in given:
        if number is not None and seen.setdefault(number, option) != option:
            raise UsageError(f"{option} {number}: {seen[number]} reads this descriptor to its end")


def new_passphrase_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a command that enrols a key, which also chooses the source of its passphrase."""
    return _KEYRING(passphrase_options(command))


_FD = click.option("--passphrase-fd", type=DESCRIPTOR, metavar="N", help="Read the passphrase from this descriptor.")
_FILE = click.option(
    "--passphrase-file",
    type=click.Path(path_type=Path),
    help="Read it from this file, which no other user may read. For a new key, the daemon reads it from there, too.",
)
_PIN_FD = click.option("--pin-fd", type=DESCRIPTOR, metavar="N", help="Read the token's PIN from this descriptor.")
_PIN_FILE = click.option(
    "--pin-file",
    type=click.Path(path_type=Path),
    help="Read the token's PIN from this file, which no other user may read. A wrong one is tried once.",
)
_KEYRING = click.option(
    "--passphrase-keyring",
    is_flag=True,
    help="Keep a new key's passphrase in the desktop's keyring, where the daemon finds it.",
)


def passphrase_to_set(given: Given, name: str) -> bytearray:
    """Obtains a new key's passphrase: from the options' file or descriptor, otherwise typed twice. The caller wipes
    it. UsageError, OSError."""
    secret = _from_options(given)
    if secret is None:
        secret = from_terminal(
            f"New passphrase for the key {name}: ",
            "The same once more: ",
            "--passphrase-fd, --passphrase-file or --no-passphrase",
            "--no-passphrase makes a key without a passphrase",
        )
    return secret


def passphrase_to_open(given: Given, name: str, signature: str, source: str) -> bytearray:
    """Obtains an existing key's passphrase: as the options specify, otherwise from its source, otherwise typed. The
    caller wipes it. UsageError, NoPassphrase, OSError."""
    secret = _from_options(given)
    if secret is not None:
        return secret
    if source == "keyring" and signature:
        return fetch_from_keyring(signature, PATIENCE)
    if source.startswith("file:"):
        return from_file(source.removeprefix("file:"))
    return from_terminal(f"Passphrase for the key {name}: ")


def _from_options(given: Given) -> bytearray | None:
    if given.fd is not None:
        return from_fd(given.fd)
    return None if given.file is None else from_file(given.file)

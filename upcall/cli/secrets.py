"""Supplies key modules with secrets while a command runs: typed on the terminal, or from the command's options."""

from __future__ import annotations

import click

from upcall.cli.output import for_terminal
from upcall.cli.passphrases import Given, passphrase_to_open
from upcall.core.errors import Refused
from upcall.keys.passphrase import from_terminal, wipe

_TRIES = 3  # wrong PINs after which no prompt opens: a token locks itself after a few


class CliSecrets:
    """Implements `keymodule.Secrets` for one key and one command. Keeps a passphrase or PIN until `close`."""

    def __init__(self, given: Given, name: str, signature: str = "", passphrase: bytearray | None = None) -> None:
        """`passphrase`: if it is known already; copied. `given`: the command's options."""
        self._given, self._name, self._signature = given, name, signature
        self.kept = None if passphrase is None else passphrase.copy()
        self._pins: dict[str, bytearray] = {}
        self._wrong: dict[str, int] = {}

    def passphrase(self, source: str, /) -> bytearray:
        """Returns the passphrase: as the options specify, otherwise from `source`, otherwise typed."""
        if self.kept is None:
            self.kept = passphrase_to_open(self._given, self._name, self._signature, source)
        return self.kept.copy()

    def pin(self, token: str, prompt: str, /) -> bytearray:
        if self._wrong.get(token, 0) >= _TRIES:
            raise Refused("pin-refused")
        if token not in self._pins:
            given = self._given.any_pin()
            self._pins[token] = (
                self._given.pin()
                if given
                else from_terminal(f"{prompt.rstrip(': ')}: ", other="--pin-fd or --pin-file")
            )
        return self._pins[token].copy()

    def verdict(self, token: str, good: bool, /) -> None:
        if good:
            self._wrong.pop(token, None)
            return
        self._wrong[token] = _TRIES if self._given.any_pin() else self._wrong.get(token, 0) + 1
        wipe(self._pins.pop(token, bytearray()))

    def touch(self, token: str, prompt: str, /) -> None:
        click.echo(f"upcall: {for_terminal(prompt)}", err=True)

    def close(self) -> None:
        """Wipes the kept secrets."""
        for secret in (self.kept, *self._pins.values()):
            if secret is not None:
                wipe(secret)
        self.kept = None
        self._pins.clear()

"""Unwraps and wraps the keys of files: by the user's own daemon, and by the passphrase of a mount."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from upcall.cli.keyshow import token_in_keyring
from upcall.cli.parameter_types import DESCRIPTOR
from upcall.client import Client, NoBroker, TimedOut
from upcall.core.errors import Refused, UpcallError, UsageError
from upcall.keys.passphrase import NoPassphrase, from_fd, from_file, from_terminal, wipe
from upcall.keys.store import KeyStore
from upcall.protocols.ecryptfs.file_cipher import PassphraseKey, stretch, unwrap_by_passphrase
from upcall.protocols.ecryptfs.header import Packet, PassphrasePacket
from upcall.protocols.ecryptfs.packets import (
    TAG_64,
    TAG_66,
    Ask,
    FileKey,
    pack_ask,
    pack_file_key,
    take_file_key,
    take_reply,
)

_PAUSES: Final = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)  # seconds before trying again
# Reasons after which trying again helps
_PASSING: Final = frozenset({"timed-out", "daemon-full", "no-context", "daemon-gone", "busy", "module-off"})
# Refusals that are about the file, or have been tried again. Others, such as "locked", concern every file.
_OF_A_FILE: Final = frozenset({"module-failed", "module-broke", "bad-answer", *_PASSING})


def concerns_all(error: Exception) -> bool:
    """Returns whether the next file would fail in the same way."""
    return isinstance(error, NoBroker | NoPassphrase) or (
        isinstance(error, Refused) and error.reason not in _OF_A_FILE
    )


class FileKeys:
    """Unwraps and wraps file keys. Each thread has a connection of its own to the broker. `passphrase`: of a mount, if
    there is one; wiped by `close`."""

    def __init__(self, runtime: Path | None, passphrase: bytearray | None = None) -> None:
        self._runtime, self.passphrase = runtime, passphrase
        self._own = threading.local()
        self._clients: list[Client] = []
        self._stretched: dict[bytes, PassphraseKey] = {}
        self._in_keyring: dict[str, bool] = {}

    def holds(self, packet: Packet) -> bool:
        """Returns whether the packet's key is one of the user's. From one thread only."""
        if isinstance(packet, PassphrasePacket):
            return self.passphrase is not None and self._stretch(packet.salt).signature == packet.signature
        if packet.signature not in self._in_keyring:
            self._in_keyring[packet.signature] = token_in_keyring(packet.signature) is not None
        return self._in_keyring[packet.signature]

    def unwrap(self, packet: Packet) -> FileKey:
        """Returns the file's key. Refused, NoBroker, TimedOut; NoPassphrase if there is none; PeerError if another
        passphrase wrapped it."""
        if isinstance(packet, PassphrasePacket):
            if self.passphrase is None:
                raise NoPassphrase(f"a mount's passphrase wrapped it ({packet.signature}): add --ask-passphrase")
            return unwrap_by_passphrase(packet, self._stretch(packet.salt))
        return take_file_key(self._ask(Ask(TAG_64, packet.signature, packet.wrapped)))

    def wrap(self, signature: str, key: FileKey) -> bytes:
        """Wraps a file's key, as the kernel has it wrapped. Refused, NoBroker, PeerError."""
        return self._ask(Ask(TAG_66, signature, pack_file_key(key)))

    def close(self) -> None:
        for client in self._clients:
            client.close()
        if self.passphrase is not None:
            wipe(self.passphrase)

    def _stretch(self, salt: bytes) -> PassphraseKey:
        if salt not in self._stretched:
            self._stretched[salt] = stretch(self.passphrase or b"", salt)
        return self._stretched[salt]

    def _ask(self, ask: Ask) -> bytes:
        """Sends a request, again if trying again may help."""
        for pause in (*_PAUSES, None):
            try:
                return self._ask_once(ask)
            except (Refused, TimedOut) as error:
                passing = isinstance(error, TimedOut) or error.reason in _PASSING
                if pause is None or not passing:
                    if isinstance(error, Refused):
                        error.key = _name_of(ask.signature)
                    raise
                time.sleep(pause)
        raise AssertionError  # the last try returns or raises

    def _ask_once(self, ask: Ask) -> bytes:
        client: Client | None = getattr(self._own, "client", None)
        if client is None:
            client = self._own.client = Client(self._runtime)
            self._clients.append(client)
        return take_reply(client.ask("key", pack_ask(ask))).content


def _name_of(signature: str) -> str:
    """Returns the name of the key in the key store, otherwise its signature."""
    try:
        return KeyStore().find(signature).name
    except (UpcallError, OSError):
        return signature


# --- options ------------------------------------------------------------------------------------------------------


def mount_passphrase_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that adds the options for the passphrase of a mount; passes it as `passphrase`, which the command
    wipes, or None."""

    @functools.wraps(command)
    def with_passphrase(
        passphrase_fd: int | None, passphrase_file: Path | None, ask_passphrase: bool, **rest: Any
    ) -> Any:
        if (passphrase_fd is not None) + (passphrase_file is not None) + ask_passphrase > 1:
            raise UsageError("only one of --passphrase-fd, --passphrase-file and --ask-passphrase can be used")
        passphrase = None
        if passphrase_fd is not None:
            passphrase = from_fd(passphrase_fd)
        elif passphrase_file is not None:
            passphrase = from_file(passphrase_file)
        elif ask_passphrase:
            passphrase = from_terminal("Passphrase of the mount: ", other="--passphrase-fd or --passphrase-file")
        return command(passphrase=passphrase, **rest)

    for option in (_ASK, _FILE, _FD):
        with_passphrase = option(with_passphrase)
    return with_passphrase


_FD = click.option(
    "--passphrase-fd",
    type=DESCRIPTOR,
    metavar="N",
    help="Read the mount's passphrase from this descriptor.",
)
_FILE = click.option(
    "--passphrase-file",
    type=click.Path(path_type=Path),
    help="Read the mount's passphrase from this file, which no other user may read.",
)
_ASK = click.option("--ask-passphrase", is_flag=True, help="Type the mount's passphrase on the terminal.")

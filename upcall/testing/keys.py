"""Implements a keyring in a folder, one file per auth token, so that tests do not change the user's keyring."""

from __future__ import annotations

import os
from pathlib import Path

from upcall.protocols.ecryptfs.authtok import AuthTok, pack_auth_tok


class FolderKeyring:
    """A keyring of auth tokens in a folder, with the interface of upcall.kernel.keyring."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self._names: dict[int, str] = {}

    def add(self, signature: str, alias: str, blob: bytes) -> str:
        """Adds an auth token atomically; returns its signature."""
        temporary = self._folder / f"new.{os.getpid()}"
        temporary.write_bytes(pack_auth_tok(AuthTok(signature, alias, blob)))
        temporary.replace(self._folder / signature)
        return signature

    def remove(self, signature: str) -> None:
        (self._folder / signature).unlink()

    def find(self, description: str, /) -> int | None:
        try:
            serial = (self._folder / description).stat().st_ino
        except FileNotFoundError:
            return None
        self._names[serial] = description
        return serial

    def read(self, serial: int, /) -> bytes:
        return (self._folder / self._names[serial]).read_bytes()

"""Reads passwords and tokens from private files or systemd's credentials (LoadCredential=), on each use, so that
changes take effect at once. They are str, which the libraries require and Python cannot wipe."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from upcall.core.errors import ModuleFailed
from upcall.keys.private_file import read_private

MAX_SECRET: Final = 4096  # bytes


def read_secret(named: str, key: str) -> str:
    """Reads a secret of one line. `named`: an absolute path, or the name of a credential. `key`: the setting that
    names it, for errors."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY", "")
    if not named.startswith("/") and not folder:
        raise ModuleFailed(f"{key}: {named!r} is no whole path, and systemd has given us no credentials")
    path = Path(folder, named)  # an absolute path replaces the folder
    try:
        data, _ = read_private(path, MAX_SECRET)
    except OSError as error:
        raise ModuleFailed(f"{key}: {path}: {error.strerror}") from error
    try:
        text = data.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise ModuleFailed(f"{key}: {path}: is not UTF-8") from None
    finally:
        data[:] = bytes(len(data))
    if not text or not text.isprintable():
        raise ModuleFailed(f"{key}: {path}: is not one line of printable characters")
    return text

"""Passwords and tokens: in a private file, or what systemd hands over (LoadCredential=). Read each time they are used,
so that a new one counts at once. Python cannot wipe the text that its libraries want."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from upcall.core.errors import ModuleFailed
from upcall.keys.private_file import read_private

MAX_SECRET: Final = 4096  # bytes


def read_secret(named: str, key: str) -> str:
    """The one line of the file: a whole path, or the name of a credential. `key`: where it is said."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY", "")
    if not named.startswith("/") and not folder:
        raise ModuleFailed(f"{key}: {named!r} is no whole path, and systemd has given us no credentials")
    path = Path(folder, named)  # a whole path stays what it is
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

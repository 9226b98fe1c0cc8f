"""Opens a key in the command's own process by its module, as the daemon does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from upcall.cli.keyshow import Target
from upcall.cli.secrets import CliSecrets
from upcall.core.errors import ModuleFailed, UsageError
from upcall.keymodule import Closable, KeyHandle, KeyImporter, KeyModule, Limits, Making
from upcall.keys import plugins as modules
from upcall.keys.enrolment import chosen, take_in
from upcall.keys.store import COMPAT, Entry


@contextlib.contextmanager
def opened(target: Target, secrets: CliSecrets) -> Iterator[KeyHandle]:
    module = load(target.module)
    blob = target.blob
    if blob is None and target.entry is not None:
        blob = blob_of(target.entry, module, secrets)
    handle = module.open(target.signature, blob or b"", secrets)
    try:
        yield handle
    finally:
        if isinstance(handle, Closable):
            handle.close()


def load(alias: str) -> KeyModule:
    return modules.load(modules.find(alias).spec)


def importer_of(module: KeyModule, alias: str) -> KeyImporter:
    if not isinstance(module, KeyImporter):
        raise UsageError(f"the key module {alias!r} takes in no keys")
    return module


def blob_of(entry: Entry, module: KeyModule, secrets: CliSecrets) -> bytes:
    """Returns an entry's blob. That of a compat key contains the passphrase and is not stored, so it is made again."""
    if entry.blob is not None:
        return entry.blob
    importer = importer_of(module, entry.module)
    values = chosen(importer.import_parameters, entry.parameters)
    path = Path() if entry.path is None else Path(entry.path)
    enrolled = take_in(importer, Making(path, values, bytearray(), COMPAT, Limits(), secrets))
    if enrolled.signature != entry.signature:
        raise ModuleFailed(f"{entry.path}: holds the key {enrolled.signature}, {entry.name} is {entry.signature}")
    return enrolled.blob

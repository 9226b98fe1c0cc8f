"""`python -m upcall.testing.daemon SETTINGS`: runs a daemon whose keyring is a folder.

SETTINGS is `DaemonForTests` as upcall/process/settings.py packs it.
"""

from __future__ import annotations

import importlib
import sys
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from upcall.core.errors import ModuleFailed, UsageError
from upcall.daemon.control import Control
from upcall.daemon.loading import handlers, loaders
from upcall.daemon.passphrase_sources import fetch
from upcall.daemon.plugins import Discovered
from upcall.daemon.process import Daemon, serve
from upcall.daemon.prompter import LazyPrompter
from upcall.daemon.reload import Renewing
from upcall.daemon.settings import DaemonSettings
from upcall.handler import Handler
from upcall.kernel.notify import Manager
from upcall.kernel.process import harden
from upcall.observe.recorder import recorder
from upcall.process import entry
from upcall.process.hardening import done_listening, of_daemon
from upcall.process.log import EventLog
from upcall.process.paths import daemon_socket, find_place, user_folder
from upcall.process.reload import Hangup
from upcall.process.settings import loads
from upcall.protocols.ecryptfs.auto_lock import Locking
from upcall.protocols.ecryptfs.key_handler import KeyHandler
from upcall.testing.keys import FolderKeyring


class DaemonForTests(NamedTuple):
    """The settings of this process."""

    keys: Path  # the folder
    daemon: DaemonSettings = DaemonSettings()
    control: bool = False  # whether it serves commands
    handlers: tuple[str, ...] = ()  # "package:attribute": imported at the start, unlike those of `daemon`
    found: Path | None = None  # a file with `Discovered`, which a reload reads; None: plugin discovery


_PATIENCE: Final = 60.0  # seconds for the keyring library on a busy machine


def run(settings: DaemonForTests, _: object) -> None:
    """As `serve_with` of upcall.daemon, but for the keyring."""
    hangup = Hangup()
    harden()
    told, found = settings.daemon, settings.found
    hardened = of_daemon(told.hardening, told.records, user_folder())
    log, manager = EventLog("upcall-daemon"), Manager()
    log("privileges-dropped", **hardened._asdict())
    modules = loaders(told.plugins.modules, lambda: keys.deadline(), log)
    prompter = LazyPrompter(told.prompting, log, told.locking.after)
    keys = KeyHandler(
        FolderKeyring(settings.keys), modules, partial(fetch, timeout=_PATIENCE), told.prove_all, prompter
    )
    control = None
    if settings.control:
        control = Control(daemon_socket(), keys.cache, keys.warm, prompter.attach)
        done_listening(hardened)
    record = recorder("upcall-daemon", told.records, log)
    serving = [keys, *map(_handler, settings.handlers), *handlers(told.plugins.handlers)]
    find_broker = partial(find_place, told.folder)
    daemon = Daemon(find_broker(), serving, control, log, manager, record, find_broker)
    daemon.tracebacks = told.traceback
    locking = Locking(keys.cache, told.locking, log)
    find = None if found is None else lambda _: _found(found)
    daemon.on_reload = Renewing(told.plugins, keys, daemon, log, find, locking).ask
    if control is not None:
        control.on_reload = daemon.on_reload
        control.more = lambda: {"hardening": hardened._asdict(), "locking": locking.report()}
    try:
        serve(daemon, hangup)
    finally:
        if control is not None:
            control.close()


def _found(file: Path) -> Discovered:
    try:
        return loads(Discovered, file.read_text("utf-8"))
    except UsageError as error:
        raise ModuleFailed(f"{file}: {error}") from error


def _handler(spec: str) -> Handler:
    package, _, name = spec.partition(":")
    found: Handler = getattr(importlib.import_module(package), name)
    return found


if __name__ == "__main__":
    sys.exit(entry.run("upcall.testing.daemon", DaemonForTests, sys.argv[1:], run))

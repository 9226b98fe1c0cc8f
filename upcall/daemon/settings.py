"""The settings of a daemon's process: made by `upcall daemon`, passed across exec by upcall/process/settings.py."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from upcall.daemon.plugins import Plugins
from upcall.daemon.prompting.settings import PromptSettings
from upcall.process.hardening import DaemonHardening
from upcall.protocols.ecryptfs.settings import LockSettings, LoginKeys


class DaemonSettings(NamedTuple):
    folder: Path | None = None  # the broker's; None: this user's own or the system's
    prove_all: bool = False  # unwrap every wrapped key before it is answered, not only the first of each size
    records: str = "no"  # where a record of each request is written (upcall/observe/recorder.py)
    plugins: Plugins = Plugins()
    locking: LockSettings = LockSettings()
    prompting: PromptSettings = PromptSettings()
    hardening: DaemonHardening = DaemonHardening()
    keys: LoginKeys = LoginKeys()
    mounts: Path | None = None  # where the user's mounts are remembered; None: nothing is mounted
    traceback: bool = False  # print the tracebacks of plugins' exceptions on standard error: they may contain secrets

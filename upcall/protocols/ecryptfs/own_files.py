"""Prevents self-deadlocks: refuses to open files for which the kernel would ask this daemon.

Such a file is on an eCryptfs mount whose key the daemon answers for: opening it sends the daemon a request. stat does
not. Python reports each open before it happens (sys.addaudithook), by upcall, a key module or an import. Opens of C
libraries are not reported; self_deadlock.py detects them while they wait.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from upcall.core.errors import PeerError
from upcall.kernel.mounts import Changes, mounts
from upcall.kernel.procfs import MOUNTINFO
from upcall.protocols.ecryptfs.authtok import take_auth_tok

WHY: Final = "lies on an eCryptfs mount whose key this user's daemon answers for, and cannot be opened by it"
_SIGNATURE: Final = "ecryptfs_sig="
_HARMLESS: Final = os.O_PATH | os.O_DIRECTORY


class KeyringReader(Protocol):
    """upcall.kernel.keyring."""

    def find(self, description: str, /) -> int | None: ...
    def read(self, serial: int, /) -> bytes: ...


def answered_for(keyring: KeyringReader, signature: str) -> bool:
    """Returns whether the kernel requests this key from the daemon. Not if its auth token holds a passphrase's key,
    which the kernel uses itself. `keyring`: that of the daemon. `signature`: 16 hexadecimal digits."""
    serial = keyring.find(signature)
    try:
        return serial is not None and take_auth_tok(keyring.read(serial)).signature == signature
    except (OSError, PeerError):
        return False


class OwnMounts:
    """The eCryptfs mounts in this process's mount namespace, with the signatures of their keys. Thread-safe."""

    def __init__(self, keyring: KeyringReader, mountinfo: Path = MOUNTINFO) -> None:
        self._keyring, self._mountinfo = keyring, mountinfo
        self._changes = Changes(mountinfo)
        self._lock = threading.RLock()  # reentrant: reading the list opens a file, which calls `key_of`
        self._signatures: dict[int, set[str]] = {}  # by device
        self._read()

    def key_of(self, path: str | bytes, creates: bool = False) -> str | None:
        """Returns the signature of the key needed to open a file, if the daemon answers for it; otherwise None.
        `creates`: the file may not exist yet; then its folder counts."""
        with self._lock:
            if self._changes.seen():
                self._read()
        if not self._signatures:
            return None
        file = Path(os.fsdecode(path))
        device = _device_of(file) or (_device_of(file.parent) if creates else 0)
        found = (one for one in self._signatures.get(device, ()) if answered_for(self._keyring, one))
        return next(found, None)

    def _read(self) -> None:
        found: dict[int, set[str]] = {}
        for mount in mounts(self._mountinfo):
            if mount.type == "ecryptfs":
                signatures = (one.removeprefix(_SIGNATURE) for one in mount.options if one.startswith(_SIGNATURE))
                found.setdefault(mount.device, set()).update(signatures)
        self._signatures = found


def _device_of(path: Path) -> int:
    """Returns the device number of the file system; 0 if the path cannot be examined."""
    try:
        return path.stat().st_dev
    except (OSError, ValueError):
        return 0


def refuse(keyring: KeyringReader, told: Callable[..., None]) -> None:
    """Installs the audit hook. From then on, opening such a file raises OSError (EDEADLK) in this process, with the
    path as `filename`. It cannot be removed (sys.addaudithook). `told`: logs an event, in the
    thread that opens the file."""
    own = OwnMounts(keyring)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event != "open":
            return
        path, _, flags = arguments
        if not isinstance(path, str | bytes) or not isinstance(flags, int) or flags & _HARMLESS:
            return
        key = own.key_of(path, bool(flags & os.O_CREAT))
        if key is not None:
            name = os.fsdecode(path)
            told("own-file-refused", file=name, key=key, thread=threading.current_thread().name)
            raise OSError(errno.EDEADLK, f"{WHY}: move it elsewhere", name)

    sys.addaudithook(hook)

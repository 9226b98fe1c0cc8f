"""A daemon opens no file that only it could let the kernel open: it would wait for itself.

Such a file lies on an eCryptfs mount whose key is one that the daemon answers for, and to open it is to ask the
daemon. Looking at it (stat) asks nobody. Python says what is about to be opened (sys.addaudithook), whoever opens it:
our code, a key module, an import. C libraries do not; what they open is found when it waits (self_deadlock.py).
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
from upcall.kernel.mounts import MOUNTINFO, Changes, mounts
from upcall.protocols.ecryptfs.authtok import take_auth_tok

WHY: Final = "lies on an eCryptfs mount whose key this user's daemon answers for, and cannot be opened by it"
_SIGNATURE: Final = "ecryptfs_sig="
_HARMLESS: Final = os.O_PATH | os.O_DIRECTORY


class Keyring(Protocol):
    """upcall.kernel.keyring."""

    def find(self, description: str, /) -> int | None: ...
    def read(self, serial: int, /) -> bytes: ...


def answered_for(keyring: Keyring, signature: str) -> bool:
    """Whether a daemon with this keyring is asked when a key of this signature is needed: not for a passphrase's."""
    serial = keyring.find(signature)
    try:
        return serial is not None and take_auth_tok(keyring.read(serial)).signature == signature
    except (OSError, PeerError):
        return False


class OwnMounts:
    """The eCryptfs mounts, as this process sees them."""

    def __init__(self, keyring: Keyring, mountinfo: Path = MOUNTINFO) -> None:
        self._keyring, self._mountinfo = keyring, mountinfo
        self._changes = Changes(mountinfo)
        self._lock = threading.RLock()  # reading the list opens a file, which is asked about here
        self._signatures: dict[int, set[str]] = {}  # by device
        self._read()

    def key_of(self, path: str | bytes, creates: bool = False) -> str | None:
        """The signature of the key that is needed to open a file, if it is one that the daemon answers for."""
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
    """0 if there is none."""
    try:
        return path.stat().st_dev
    except (OSError, ValueError):
        return 0


def refuse(keyring: Keyring, told: Callable[..., None]) -> None:
    """From now on, and for good, opening such a file is an OSError (EDEADLK) in this process, with the path as
    `filename`. `told`: a log."""
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

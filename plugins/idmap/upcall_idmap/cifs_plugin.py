"""Calls /etc/cifs-utils/idmap-plugin, by which cifs-utils maps SIDs: a library of winbind or sssd.

Source: cifsidmap.h of cifs-utils, which defines the plugin's interface; idmap-plugin(8).
"""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from typing import Final

from upcall.core.errors import PeerError, Refused
from upcall.protocols.request_key.cifs_idmap import Sid, pack_sid, take_payload_sid

FILE: Final = Path("/etc/cifs-utils/idmap-plugin")
_SID_SIZE: Final = 68  # sizeof(struct cifs_sid), the kernel's format
_UNKNOWN, _UID, _GID, _BOTH = range(4)  # of struct cifs_uxid


class _Id(ctypes.Structure):
    """struct cifs_uxid"""

    _pack_ = 1
    _fields_ = [("id", ctypes.c_uint32), ("type", ctypes.c_ubyte)]


class Plugin:
    """The plugin. Thread-safe: a lock admits one call at a time. Calls block without a time-out."""

    def __init__(self, file: Path = FILE) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._library: ctypes.CDLL | None = None
        self._handle = ctypes.c_void_p()
        self._error = ctypes.c_char_p()  # the library stores its error message here

    def id_of(self, sid: Sid, group: bool) -> int:
        """Returns the uid or gid for a SID. Refused if it has none, or the service does not run."""
        found = _Id()
        with self._lock:
            said = self._ready().cifs_idmap_sids_to_ids(self._handle, pack_sid(sid), 1, ctypes.byref(found))
            self._check(said, f"no id for {sid}")
        if found.type not in ((_GID if group else _UID), _BOTH):
            raise Refused("no-such-name", why=f"{sid} is no {'group' if group else 'user'}")
        return int(found.id)

    def sid_of(self, number: int, group: bool) -> Sid:
        """Returns the SID for a uid or gid. Refused as above."""
        asked, found = _Id(number, _GID if group else _UID), ctypes.create_string_buffer(_SID_SIZE)
        with self._lock:
            said = self._ready().cifs_idmap_ids_to_sids(self._handle, ctypes.byref(asked), 1, found)
            self._check(said, f"no SID for {'group' if group else 'user'} {number}")
        try:
            return take_payload_sid(found.raw)
        except PeerError as error:
            raise Refused("no-such-name", why=f"no SID for {number}: {error}") from None

    def _ready(self) -> ctypes.CDLL:
        """Returns the library; loads and initialises it unless that has succeeded before. Refused."""
        if self._library is not None:
            return self._library
        try:
            library = ctypes.CDLL(str(self._file))
            start = library.cifs_idmap_init_plugin
            translate = (library.cifs_idmap_sids_to_ids, library.cifs_idmap_ids_to_sids)
        except (OSError, AttributeError) as error:
            why = f"{error}; cifs-utils has such plugins for winbind and sssd: idmap-plugin(8)"
            raise Refused("no-name-service", why=why) from None
        for function in translate:
            function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        if start(ctypes.byref(self._handle), ctypes.byref(self._error)) != 0:
            raise Refused("no-name-service", why=f"{self._file} cannot start: {self._message()}")
        self._library = library
        return library

    def _check(self, said: int, what: str) -> None:
        if said != 0:
            message = self._message()
            reason = "no-name-service" if "NOT_AVAILABLE" in message else "no-such-name"
            raise Refused(reason, why=f"{what}: {message}")

    def _message(self) -> str:
        return (self._error.value or b"no reason given").decode("utf-8", "backslashreplace")

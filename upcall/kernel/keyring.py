"""Accesses the kernel's keyrings: auth tokens are keys of type "user", described by their signature.

Source: keyctl(2), add_key(2), keyrings(7); include/uapi/linux/keyctl.h. Raw system calls, because glibc has no
wrappers. Errors are OSError with the operation in `filename`.

A process *possesses* a key that it reaches from its thread, process or session keyring, and has the possessor's rights
then; otherwise it has the owner's, which are next to none by default. A login session links the user keyring into its
session keyring; a cron job, `su` or a container often has one without. There, a process cannot read a key that it has
just added to its own user keyring. So both sides act: `ensure_user_keyring_linked` makes this process a possessor, and
`add_user_key` grants the owner's other processes the right to read.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
import threading
from typing import Final, NamedTuple

from upcall.kernel import libc

PROCESS_KEYRING: Final = -2
SESSION_KEYRING: Final = -3
USER_KEYRING: Final = -4

# add_key, keyctl; arm64 and riscv64 share the generic table
_NUMBERS = {"x86_64": (248, 250), "aarch64": (217, 219), "riscv64": (217, 219)}
_ADD_KEY, _KEYCTL = _NUMBERS.get(os.uname().machine if sys.maxsize > 1 << 32 else "", (-1, -1))  # ENOSYS

_JOIN_SESSION, _REVOKE, _SETPERM, _DESCRIBE = 1, 3, 5, 6
_LINK, _UNLINK, _SEARCH, _READ = 8, 9, 10, 11
_SET_TIMEOUT, _GET_PERSISTENT, _MOVE, _CAPABILITIES = 15, 22, 30, 31
_MOVE_EXCL = 1  # EEXIST instead of displacing a key of the same type and description

# Bits of `capabilities`: KEYCTL_CAPS0_*.
PERSISTENT_KEYRINGS: Final = 0x02
MOVE: Final = 0x80

# Possessor: all. User: view, read, search. Any process of this uid can become a possessor by linking the user
# keyring, so the owner's read right discloses nothing more; without it ecryptfsd, a mount helper or a daemon
# started from a bare session could not read the auth token. None for the group and others.
PERMISSIONS: Final = 0x3F0B0000

MAX_PAYLOAD: Final = 32767  # bytes of a "user" key: user_preparse() in security/keys/user_defined.c
MAX_KEYRING: Final = 1 << 20  # a limit of upcall's: bytes of serials in a keyring, four for each key
MAX_DESCRIPTION: Final = 4096 + 64  # KEY_MAX_DESC_SIZE is a page; type and numbers come before it
_NO_USABLE_KEY = {errno.ENOKEY, errno.EKEYREVOKED, errno.EKEYEXPIRED, errno.EKEYREJECTED, errno.EACCES}

# These calls keep the GIL: they take about a microsecond and do not block, while getting the GIL back can take
# milliseconds if another thread is computing.
_LONG, _TEXT, _POINTER = ctypes.c_long, ctypes.c_char_p, ctypes.c_void_p
_add_key = libc.prepared_syscall(_LONG, _TEXT, _TEXT, _TEXT, ctypes.c_size_t, _LONG, keep_gil=True)
_keyctl = libc.prepared_syscall(_LONG, _LONG, _LONG, _POINTER, _POINTER, _LONG, keep_gil=True)


# Called for each request: the constant arguments are converted once.
_search = libc.prepared_syscall(keep_gil=True)
_SEARCH_USER_KEYRING = (
    *map(ctypes.c_long, (_KEYCTL, _SEARCH, USER_KEYRING)),
    ctypes.c_char_p(b"user"),
)
_ZERO = ctypes.c_long(0)


class KeyDescription(NamedTuple):
    """A key's attributes. `permissions`: 8 bits each for possessor, user, group and others."""

    serial: int
    type: str
    uid: int
    gid: int
    permissions: int
    description: str


class _Scratch(threading.local):
    """A buffer per thread with room for any "user" key's payload, so that reading is one system call."""

    def __init__(self) -> None:
        self.size = MAX_PAYLOAD + 1
        self.buffer = ctypes.create_string_buffer(self.size)
        self.address = ctypes.addressof(self.buffer)


_scratch = _Scratch()


# --- on the hot path of a request ----------------------------------------------------------------------------


def find(description: str) -> int | None:
    """Returns the serial of the "user" key with this description in the user keyring, as libecryptfs searches for it.

    None if there is none, or it is not usable: revoked, expired, or without search permission.
    """
    serial: int = _search(*_SEARCH_USER_KEYRING, description.encode(), _ZERO)
    if serial > 0:
        return serial
    if libc.errno() in _NO_USABLE_KEY:
        return None
    raise libc.error("KEYCTL_SEARCH")


def read(serial: int) -> bytes:
    """Returns the payload of a "user" key. The buffer of the system call is wiped; the returned bytes are not.
    OSError."""
    scratch = _scratch
    size: int = _keyctl(_KEYCTL, _READ, serial, scratch.address, scratch.size, 0)
    if size < 0:
        raise libc.error("KEYCTL_READ")
    if size > scratch.size:
        raise OSError(errno.EMSGSIZE, f"a payload of {size} bytes", "KEYCTL_READ")
    payload = ctypes.string_at(scratch.address, size)
    ctypes.memset(scratch.address, 0, size)
    return payload


# --- adding and removing keys -------------------------------------------------------------------------------


def add_user_key(description: str, payload: bytes, keyring: int = USER_KEYRING) -> int:
    """Adds a key of type "user", or replaces the payload of an existing one; returns its serial. ValueError if the
    description contains a NUL; OSError.

    In the user keyring it gets PERMISSIONS, and this process becomes a possessor, because only a possessor may set
    them.
    """
    if "\0" in description:
        raise ValueError("the description of a key cannot hold a NUL")
    if keyring == USER_KEYRING:
        ensure_user_keyring_linked()
    return _add(b"user", description, payload, keyring)


def add_keyring(description: str, keyring: int) -> int:
    """Adds an empty keyring, which replaces one of the same description; returns its serial. OSError."""
    return _add(b"keyring", description, None, keyring)


def _add(kind: bytes, description: str, payload: bytes | None, keyring: int) -> int:
    serial: int = _add_key(_ADD_KEY, kind, description.encode(), payload, len(payload or b""), keyring)
    if serial < 0:
        raise libc.error("add_key")
    _call("KEYCTL_SETPERM", _SETPERM, serial, PERMISSIONS)
    return serial


def set_timeout(serial: int, seconds: int) -> None:
    """Makes the key expire in `seconds`; 0: never. A new payload removes the time-out."""
    _call("KEYCTL_SET_TIMEOUT", _SET_TIMEOUT, serial, seconds)


def move(serial: int, source: int, target: int, *, exclusive: bool = False) -> None:
    """Moves a key from one keyring to another atomically; replaces a key of the same type and description there.

    With `exclusive`, FileExistsError instead. Since Linux 5.3.
    """
    _call("KEYCTL_MOVE", _MOVE, serial, source, target, _MOVE_EXCL if exclusive else 0)


def unlink(serial: int, keyring: int = USER_KEYRING) -> None:
    """Removes the key from the keyring. A mount that holds it keeps it."""
    _call("KEYCTL_UNLINK", _UNLINK, serial, keyring)


def revoke(serial: int) -> None:
    """Makes the key unusable for every holder, mounts included."""
    _call("KEYCTL_REVOKE", _REVOKE, serial)


# --- inspecting keys ----------------------------------------------------------------------------------------


def describe(serial: int) -> KeyDescription:
    """Returns the attributes of a key. OSError without permission to view it."""
    kind, uid, gid, permissions, description = os.fsdecode(describe_raw(serial)).split(";", 4)
    return KeyDescription(serial, kind, int(uid), int(gid), int(permissions, 16), description)


def describe_raw(serial: int) -> bytes:
    """Returns the same as the kernel writes it, "type;uid;gid;permissions;description", without the NUL."""
    buffer = ctypes.create_string_buffer(MAX_DESCRIPTION)
    size = _call("KEYCTL_DESCRIBE", _DESCRIBE, serial, ctypes.addressof(buffer), len(buffer))
    if size > len(buffer):
        raise OSError(errno.EMSGSIZE, f"a description of {size} bytes", "KEYCTL_DESCRIBE")
    return buffer.raw[: size - 1]


def search(keyring: int, kind: str, description: str) -> int | None:
    """Returns the serial of the key of this type and description in the keyring, or in one linked there; None as in
    `find`."""
    serial: int = _search(
        *map(ctypes.c_long, (_KEYCTL, _SEARCH, keyring)),
        *map(ctypes.c_char_p, (kind.encode(), description.encode())),
        _ZERO,
    )
    if serial > 0:
        return serial
    if libc.errno() in _NO_USABLE_KEY:
        return None
    raise libc.error("KEYCTL_SEARCH")


def capabilities() -> int:
    """Returns the bits PERSISTENT_KEYRINGS, MOVE and others of a kernel that lets this process add keys. Changes none.

    OSError: ENOSYS without keyrings, EOPNOTSUPP before Linux 5.3, EPERM from the seccomp filter of a container.
    """
    _add_key(_ADD_KEY, None, None, None, 0, 0)
    if libc.errno() != errno.EFAULT:  # the kernel's error for a missing type
        raise libc.error("add_key")
    bits = ctypes.c_ubyte()
    _call("KEYCTL_CAPABILITIES", _CAPABILITIES, ctypes.addressof(bits), ctypes.sizeof(bits))
    return bits.value


def list_user_keyring() -> list[KeyDescription]:
    """Returns the keys directly in the user keyring, except those without view permission or removed meanwhile."""
    return list_keyring(USER_KEYRING)


def list_keyring(keyring: int) -> list[KeyDescription]:
    """Returns the same of any keyring."""
    keys = []
    for (serial,) in struct.iter_unpack("=i", _read_keyring(keyring)):
        try:
            keys.append(describe(serial))
        except OSError as error:
            if error.errno not in _NO_USABLE_KEY:
                raise
    return keys


def _read_keyring(keyring: int) -> bytes:
    """Returns the serials in a keyring; reads again if it grew between two calls."""
    size = 256
    while size <= MAX_KEYRING:
        buffer = ctypes.create_string_buffer(size)
        needed = _call("KEYCTL_READ", _READ, keyring, ctypes.addressof(buffer), size)
        if needed <= size:
            return buffer.raw[:needed]
        size = needed + 64
    raise OSError(errno.EMSGSIZE, f"a keyring of {size} bytes", "KEYCTL_READ")


def user_keyring_is_linked() -> bool:
    """Returns whether the user keyring is reachable from the session keyring, at any depth. OSError EKEYREVOKED or
    EKEYEXPIRED if the session keyring is unusable."""
    describe_raw(SESSION_KEYRING)  # reports an unusable session keyring; the search would not
    name = f"_uid.{os.getuid()}".encode()
    return int(_search(_KEYCTL, _SEARCH, SESSION_KEYRING, ctypes.c_char_p(b"keyring"), name, _ZERO)) > 0


# --- becoming a possessor -----------------------------------------------------------------------------------


def ensure_user_keyring_linked() -> None:
    """Makes this process a possessor of the keys in the user keyring, without changing the session keyring.

    Links the user keyring into the process keyring, which lasts until exec or the end of the process. Threads inherit
    it when they are started: call this first. OSError.
    """
    _call("KEYCTL_LINK", _LINK, USER_KEYRING, PROCESS_KEYRING)


def link_persistent_keyring() -> int:
    """Returns the serial of the user's persistent keyring, and makes this thread a possessor through its process
    keyring.

    The kernel creates it if necessary, keeps it without any process or session, and removes it with its keys when this
    was not called for /proc/sys/kernel/keys/persistent_keyring_expiry seconds (three days). A running thread does not
    get the link: each must call this itself. Source: persistent-keyring(7).
    """
    return _call("KEYCTL_GET_PERSISTENT", _GET_PERSISTENT, -1, PROCESS_KEYRING)


def join_session_and_link_user_keyring() -> int:
    """Joins a new session keyring that contains only the user keyring; returns its serial. For daemons.

    Unlike the process keyring it survives exec, so child processes possess the keys, too. Call before other threads
    start.
    """
    serial = _call("KEYCTL_JOIN_SESSION_KEYRING", _JOIN_SESSION, 0)
    _call("KEYCTL_LINK", _LINK, USER_KEYRING, SESSION_KEYRING)
    return serial


def _call(name: str, operation: int, first: int, second: int = 0, third: int = 0, fourth: int = 0) -> int:
    result: int = _keyctl(_KEYCTL, operation, first, second, third, fourth)
    if result < 0:
        raise libc.error(name)
    return result

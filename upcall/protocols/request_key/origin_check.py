"""Checks that the kernel made an upcall of request_key, and determines whose daemon must answer it. Pure.

Ordinary users can choose a key's description, by request_key(2) on some kernels, or by names passed to mount.
Therefore it is used only after these checks: the kernel requested the key with its own credentials, the authorisation
key exists and belongs to it, and the description has exactly the format that the kernel writes for this type.
"""

from __future__ import annotations

from typing import NamedTuple

from upcall.core.errors import PeerError, Refused
from upcall.protocols.request_key.key_type import ROOT, Wanted
from upcall.protocols.request_key.key_types import KEY_TYPES
from upcall.protocols.request_key.messages import Described, Upcall

AUTHORISATION = ".request_key_auth"

# Permissions of a key that the kernel makes (construct_alloc_key() in security/keys/request_key.c): some for the
# possessor, view for the owner, none for group and others.
_OWNER_AND_OTHERS, _ONLY_LOOKING = 0x00FFFFFF, 0x00010000


class Who(NamedTuple):
    """The process on whose behalf the kernel made the request, as described by /proc."""

    pid: int  # of the process, where the kernel named a thread
    uid: int  # real
    euid: int
    started: int  # clock ticks since boot


def check_key(upcall: Upcall, key: Described, authorisation: Described) -> None:
    """Checks that the kernel made this upcall. `key`, `authorisation`: the kernel's descriptions of both keys. Refused
    with "unknown-type" or "forged"."""
    if key.type not in KEY_TYPES:
        raise Refused("unknown-type", why=f"upcall answers no keys of type {key.type!r}")
    if (key.uid, key.gid) != (ROOT, ROOT):
        raise Refused("forged", why=f"the key belongs to uid {key.uid}, gid {key.gid}: the kernel did not request it")
    if key.permissions & _OWNER_AND_OTHERS != _ONLY_LOOKING:
        raise Refused("forged", why=f"permissions {key.permissions:08x} are not those that the kernel gives")
    if authorisation.type != AUTHORISATION or authorisation.uid != ROOT:
        raise Refused("forged", why=f"key {upcall.authorisation} is not the kernel's authorisation")
    if authorisation.description != b"%x" % upcall.key:
        raise Refused("forged", why=f"the authorisation {upcall.authorisation} is for another key")


def wanted(key: Described) -> Wanted:
    """Parses the description of a key that passed `check_key`. Refused ("forged") if it does not have the format that
    the kernel writes for this type."""
    try:
        return KEY_TYPES[key.type].wanted(key.description)
    except PeerError as error:
        raise Refused("forged", why=str(error)) from error


def check_requester(want: Wanted, who: Who, since: int) -> None:
    """Checks that the process is the one that the kernel named, and that it may use the credentials of `want.uid`.

    `since`: the forwarder's start time, in clock ticks since boot. A process that started later has reused the pid:
    "requester-gone". Otherwise any process may cause a request for another uid: whichever process finds a connection
    broken reconnects for the user who mounted. Exception, "not-permitted": a set-uid root program, such as
    mount.cifs, started by a third user. Raises Refused with these reasons.
    """
    if who.started > since:
        raise Refused("requester-gone", why=f"pid {want.pid} is another process by now")
    if who.euid == ROOT and who.uid not in (ROOT, want.uid):
        raise Refused("not-permitted", why=f"uid {who.uid} runs a program as root that asks for uid {want.uid}")

"""The gate: whether an upcall of request_key is what it claims to be, and whose daemon is to answer it. Pure.

The description of a key is text that ordinary users can make, by request_key(2) on kernels that let them, or by names
that they give to mount. So nothing in it is believed before these are right: the key is one that the kernel asked for
with its own credentials, its authorisation is there, and the text is exactly what a kernel writes for that type.
"""

from __future__ import annotations

from typing import NamedTuple

from upcall.core.errors import PeerError, Refused
from upcall.protocols.request_key.key_type import ROOT, Wanted
from upcall.protocols.request_key.key_types import KEY_TYPES
from upcall.protocols.request_key.messages import Described, Upcall

AUTHORISATION = ".request_key_auth"

# What the kernel gives a key that it makes itself (construct_alloc_key() in security/keys/request_key.c): the
# possessor may do this and that, the owner may look, and nobody else anything.
_OWNER_AND_OTHERS, _ONLY_LOOKING = 0x00FFFFFF, 0x00010000


class Who(NamedTuple):
    """The process that the kernel was working for, as /proc knows it."""

    pid: int  # of the process, where the kernel named a thread
    uid: int  # real
    euid: int
    started: int  # clock ticks since boot


def check_key(upcall: Upcall, key: Described, authorisation: Described) -> None:
    """`key` and `authorisation` are the kernel's words about both. Refused if somebody made this up."""
    if key.type not in KEY_TYPES:
        raise Refused("unknown-type", why=f"keys of type {key.type!r} are nobody's here")
    if (key.uid, key.gid) != (ROOT, ROOT):
        raise Refused("forged", why=f"the key belongs to uid {key.uid}, gid {key.gid}: not the kernel asked for it")
    if key.permissions & _OWNER_AND_OTHERS != _ONLY_LOOKING:
        raise Refused("forged", why=f"permissions {key.permissions:08x} are not those that the kernel gives")
    if authorisation.type != AUTHORISATION or authorisation.uid != ROOT:
        raise Refused("forged", why=f"key {upcall.authorisation} is not the kernel's authorisation")
    if authorisation.description != b"%x" % upcall.key:
        raise Refused("forged", why=f"the authorisation {upcall.authorisation} is for another key")


def wanted(key: Described) -> Wanted:
    """What the description of a checked key wants. Refused if it is not what a kernel writes."""
    try:
        return KEY_TYPES[key.type].wanted(key.description)
    except PeerError as error:
        raise Refused("forged", why=str(error)) from error


def check_requester(want: Wanted, who: Who, since: int) -> None:
    """Whether the process can be the one that the kernel meant, and may ask for those credentials.

    `since`: when the kernel started the forwarder. Who asks for whom is the kernel's affair otherwise: the process
    that finds a connection broken makes it anew for whoever mounted. Only a program that runs as root for somebody
    else, as mount.cifs does, must not get the credentials of a third.
    """
    if who.started > since:
        raise Refused("requester-gone", why=f"pid {want.pid} is another process by now")
    if who.euid == ROOT and who.uid not in (ROOT, want.uid):
        raise Refused("not-permitted", why=f"uid {who.uid} runs a program as root that asks for uid {want.uid}")

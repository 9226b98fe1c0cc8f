"""Keys of type "id_resolver": names and ids that the kernel's NFSv4 client has the system translate.

    description  "uid:NAME", "gid:NAME": the id is wanted; "user:ID", "group:ID": the name is wanted
    callout      empty
    payload      of an id: decimal digits and NUL, 11 bytes at most; of a name: "NAME@DOMAIN" without NUL

NAME is what the server sent, as a rule "name@domain", any bytes but NUL. The kernel copies an id into a buffer of 11
bytes on its stack and gives that to kstrtol() without looking for the NUL: one that is missing makes it read beyond.
A name is copied into a buffer of 128 bytes, by its length. If the kernel is refused, it takes -2 for an id, and sends
the digits for a name.

Type "id_legacy" is no type of ours: its requests go to rpc.idmapd by a pipe, never to /sbin/request-key.
Source: fs/nfs/nfs4idmap.c; nfsidmap(8).
"""

from __future__ import annotations

from typing import Final, NamedTuple

from upcall.core.errors import PeerError
from upcall.protocols.request_key.conf import RequestedKey
from upcall.protocols.request_key.key_type import KeyType, Option, by_name, of_the_system
from upcall.protocols.request_key.messages import take_ask, take_id, take_limited, take_plain_ask

TYPE: Final = "id_resolver"
MAX_NAME: Final = 128  # bytes of an answer: IDMAP_NAMESZ
MAX_ASKED: Final = 1024  # bytes of a name that a server may send: XDR_MAX_NETOBJ
MAX_EXPIRY: Final = 86400  # seconds: an account that was renamed is noticed within a day

_TO_ID: Final = {b"uid": False, b"gid": True}
_TO_NAME: Final = {b"user": False, b"group": True}


class Query(NamedTuple):
    """What is asked for: the id of the user or group `subject`, if that is a name, or the name, if it is an id."""

    group: bool
    subject: str | int


def take_description(text: bytes) -> Query:
    """What a description asks for. PeerError if it is not what a kernel writes."""
    kind, colon, value = text.partition(b":")
    if colon and kind in _TO_ID:
        return Query(_TO_ID[kind], _take_name(value, MAX_ASKED))
    if colon and kind in _TO_NAME:
        return Query(_TO_NAME[kind], take_id(TYPE, value))
    raise PeerError(TYPE, "the description does not begin with uid:, gid:, user: or group:", 0)


def pack_description(query: Query) -> bytes:
    """What a kernel writes. PeerError for what it could not."""
    if isinstance(query.subject, str):
        text = ("gid:" if query.group else "uid:") + query.subject
    else:
        text = f"{'group' if query.group else 'user'}:{query.subject}"
    take_description(text.encode())
    return text.encode()


def pack_id(number: int) -> bytes:
    """The payload for a name. PeerError for a number that is no id."""
    payload = b"%d\0" % number
    take_id(TYPE, payload[:-1])
    return payload


def pack_name(name: str) -> bytes:
    """The payload for an id: NAME@DOMAIN. PeerError for what is none, or too long for the kernel."""
    payload = name.encode()
    _check_answered_name(payload)
    return payload


def check_request(body: bytes) -> None:
    """For the broker: what a daemon is asked."""
    take_description(take_plain_ask(TYPE, body))


def check_answer(asked: bytes, answer: bytes) -> None:
    """For the broker: an id for a name, a name for an id, and for a limited time."""
    query = take_description(take_ask(asked).description)
    instance = take_limited(TYPE, answer, MAX_EXPIRY)
    if isinstance(query.subject, int):
        _check_answered_name(instance.payload)
    elif instance.payload[-1:] != b"\0":
        raise PeerError(TYPE, "an id without a NUL at its end", len(instance.payload))
    else:
        take_id(TYPE, instance.payload[:-1])


def _check_answered_name(payload: bytes) -> None:
    """Its domain has to be there: to a server, digits alone would be an id."""
    name, at, domain = _take_name(payload, MAX_NAME).rpartition("@")
    if not (name and at and domain):
        raise PeerError(TYPE, f"a name of {len(payload)} bytes that is not NAME@DOMAIN")


def _take_name(text: bytes, most: int) -> str:
    if not 1 <= len(text) <= most:
        raise PeerError(TYPE, f"a name of {len(text)} bytes, 1 to {most} are right")
    try:
        name = text.decode()
    except UnicodeDecodeError as error:
        raise PeerError(TYPE, "the name is not UTF-8", error.start) from None
    if not name.isprintable():
        raise PeerError(TYPE, f"a name of {len(text)} bytes with characters that cannot be printed")
    return name


# --- the type ------------------------------------------------------------------------------------------------


KEY_TYPE = KeyType(
    TYPE,
    "Names and ids of users and groups that the kernel's NFSv4 client translates.",
    of_the_system(take_description),
    check_request,
    check_answer,
    patience=6.0,  # whoever looks at a file waits for it; nobody's id is better than a folder that hangs
    patterns=(b"uid:*", b"gid:*", b"user:*", b"group:*"),
    typical=(
        RequestedKey(b"id_resolver", b"uid:any@any.invalid"),
        RequestedKey(b"id_resolver", b"gid:any@any.invalid"),
        RequestedKey(b"id_resolver", b"user:1000"),
        RequestedKey(b"id_resolver", b"group:1000"),
    ),
    options=(Option("name", "NAME", "uid:NAME@DOMAIN, gid:NAME@DOMAIN, user:ID or group:ID.", required=True),),
    described=by_name(TYPE, take_description),
    kernel=("NFSv4 can ask for names and ids", "nfsv4", "CONFIG_NFS_V4"),
    of_the_system=True,
    network=True,  # name services have what a directory in the network says; and no right is needed to ask them
)

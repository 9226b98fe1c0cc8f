"""Packs and parses keys of type "id_resolver", by which the kernel's NFSv4 client maps names to ids and back. Pure.

    description  "uid:NAME", "gid:NAME": requests an id; "user:ID", "group:ID": requests a name
    callout      empty
    payload      of an id: decimal digits and NUL, at most 11 bytes; of a name: "NAME@DOMAIN" without NUL

NAME is what the server sent: usually "name@domain", any bytes but NUL. The kernel copies an id into a buffer of 11
bytes on its stack and calls kstrtol() without checking for the NUL: without one it reads beyond the buffer. A name is
copied into a buffer of 128 bytes, by its length. If a key is refused, the kernel uses -2 as id, and sends the digits
as name.

Type "id_legacy" is not handled here: its requests go to rpc.idmapd through a pipe, not to /sbin/request-key.
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
MAX_EXPIRY: Final = 86400  # seconds; bounds how long a renamed account stays unnoticed

_TO_ID: Final = {b"uid": False, b"gid": True}
_TO_NAME: Final = {b"user": False, b"group": True}


class Query(NamedTuple):
    """A parsed description. If `subject` is a name, the uid or gid is requested; if it is an id, the name is."""

    group: bool
    subject: str | int


def take_description(text: bytes) -> Query:
    """Parses a description. PeerError if it does not have the kernel's format."""
    kind, colon, value = text.partition(b":")
    if colon and kind in _TO_ID:
        return Query(_TO_ID[kind], _take_name(value, MAX_ASKED))
    if colon and kind in _TO_NAME:
        return Query(_TO_NAME[kind], take_id(TYPE, value))
    raise PeerError(TYPE, "the description does not begin with uid:, gid:, user: or group:", 0)


def pack_description(query: Query) -> bytes:
    """Returns the description of a query, as the kernel writes it. PeerError if a value is out of bounds."""
    if isinstance(query.subject, str):
        text = ("gid:" if query.group else "uid:") + query.subject
    else:
        text = f"{'group' if query.group else 'user'}:{query.subject}"
    take_description(text.encode())
    return text.encode()


def pack_id(number: int) -> bytes:
    """Returns the payload of a key that maps a name to this uid or gid. PeerError unless it is 0 to MAX_ID."""
    payload = b"%d\0" % number
    take_id(TYPE, payload[:-1])
    return payload


def pack_name(name: str) -> bytes:
    """Returns the payload of a key that maps an id to this name. PeerError unless it is NAME@DOMAIN, printable, and
    at most MAX_NAME bytes long in UTF-8."""
    try:
        payload = name.encode()
    except UnicodeEncodeError as error:  # an account's name that is not UTF-8 has lone surrogates
        raise PeerError(TYPE, "the name is not UTF-8", error.start) from None
    _check_answered_name(payload)
    return payload


def check_request(body: bytes) -> None:
    """Checks the body of an Ask. PeerError if its description is malformed, or it has a callout."""
    take_description(take_plain_ask(TYPE, body))


def check_answer(asked: bytes, answer: bytes) -> None:
    """Checks the body of an Instance. `asked`: that of the Ask. PeerError unless the payload is an id for a name or a
    name for an id, and expires within MAX_EXPIRY seconds."""
    query = take_description(take_ask(asked).description)
    instance = take_limited(TYPE, answer, MAX_EXPIRY)
    if isinstance(query.subject, int):
        _check_answered_name(instance.payload)
    elif instance.payload[-1:] != b"\0":
        raise PeerError(TYPE, "an id without a NUL at its end", len(instance.payload))
    else:
        take_id(TYPE, instance.payload[:-1])


def _check_answered_name(payload: bytes) -> None:
    """PeerError unless the name has a domain: a server would take digits without one for an id."""
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
    patience=6.0,  # stat(2) blocks meanwhile; after a refusal the kernel shows the id of nobody
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
    package="upcall-idmap",
    of_the_system=True,
    network=True,  # name services return data from the network; querying them needs no privilege
)

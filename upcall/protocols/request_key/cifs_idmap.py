"""Packs and parses keys of type "cifs.idmap", by which the kernel's CIFS client maps SIDs to ids and back. Pure.

    description  "os:SID", "gs:SID": requests a uid or gid; "oi:UID", "gi:GID": requests a SID
    callout      empty
    payload      of an id: u32 in native byte order; of a SID: revision u8, count of sub-authorities u8,
                 authority (6 bytes, big-endian), 15 sub-authorities u32 (little-endian; those beyond the count are 0)

The client requests such keys on mounts with the option cifsacl. SID is "S-REVISION-AUTHORITY-SUB-..." as a server sent
it; an authority of more than 32 bits is in hexadecimal. The kernel checks the size of an id (4) and that a SID's count
fits the payload. If a key is refused, the kernel uses the mount's ids.
Source: fs/smb/client/cifsacl.c (sid_to_key_str(), id_to_sid(), sid_to_id()) and cifspdu.h; cifs.idmap(8).
"""

from __future__ import annotations

import re
import struct
from typing import Final, NamedTuple

from upcall.core.errors import PeerError
from upcall.protocols.request_key.conf import RequestedKey
from upcall.protocols.request_key.key_type import KeyType, Option, by_name, of_the_system
from upcall.protocols.request_key.messages import MAX_ID, take_ask, take_id, take_limited, take_plain_ask

TYPE: Final = "cifs.idmap"
MAX_SUB_AUTHORITIES: Final = 15
MAX_EXPIRY: Final = 86400  # seconds; bounds how long a changed id stays unnoticed
REVISION: Final = 1

_TO_ID: Final = {b"os": False, b"gs": True}
_TO_SID: Final = {b"oi": False, b"gi": True}
_U32 = rb"(?:0|[1-9][0-9]{0,9})"
_SID = re.compile(rb"S-1-(?P<authority>%b|0x[1-9a-f][0-9a-f]{8,11})(?P<rest>(?:-%b){0,15})" % (_U32, _U32))
_HEAD = struct.Struct("<BB6s")
_NUMBER = struct.Struct("=I")
_PAYLOAD_SIZE: Final = _HEAD.size + 4 * MAX_SUB_AUTHORITIES


class Sid(NamedTuple):
    """A security identifier of revision 1."""

    authority: int  # 48 bits
    sub_authorities: tuple[int, ...]  # 32 bits each, 15 at most

    def __str__(self) -> str:
        """As the kernel and winbind write it."""
        authority = self.authority if self.authority < 1 << 32 else f"{self.authority:#x}"
        return "-".join(map(str, ("S", REVISION, authority, *self.sub_authorities)))


class Query(NamedTuple):
    """A parsed description. If `subject` is a SID, the uid or gid is requested; if it is an id, the SID is."""

    group: bool
    subject: Sid | int


def take_description(text: bytes) -> Query:
    """Parses a description. PeerError if it does not have the kernel's format."""
    kind, colon, value = text.partition(b":")
    if colon and kind in _TO_ID:
        return Query(_TO_ID[kind], take_sid(value))
    if colon and kind in _TO_SID:
        return Query(_TO_SID[kind], take_id(TYPE, value))
    raise PeerError(TYPE, "the description does not begin with os:, gs:, oi: or gi:", 0)


def pack_description(query: Query) -> bytes:
    """Returns the description of a query, as the kernel writes it. PeerError if a value is out of bounds."""
    what = "s" if isinstance(query.subject, Sid) else "i"
    text = f"{'g' if query.group else 'o'}{what}:{query.subject}".encode()
    take_description(text)
    return text


def take_sid(text: bytes) -> Sid:
    """Parses a SID that fills `text`. PeerError if it is malformed, or not in its shortest form."""
    found = _SID.fullmatch(text)
    if found is None:
        raise PeerError(TYPE, f"a SID of {len(text)} bytes that is not S-1-AUTHORITY-SUB-...")
    sid = Sid(int(found["authority"], 0), tuple(map(int, found["rest"].split(b"-")[1:])))
    if str(sid).encode() != text or any(number >> 32 for number in sid.sub_authorities):
        raise PeerError(TYPE, f"a SID of {len(text)} bytes whose numbers are too large")
    return sid


def pack_id(number: int) -> bytes:
    """Returns the payload of a key that maps a SID to this uid or gid. PeerError unless it is 0 to MAX_ID."""
    if not 0 <= number <= MAX_ID:
        raise PeerError(TYPE, "an id out of bounds")
    return _NUMBER.pack(number)


def pack_sid(sid: Sid) -> bytes:
    """Returns the payload of a key that maps an id to this SID. PeerError if a number is out of bounds."""
    if not (0 <= sid.authority < 1 << 48 and len(sid.sub_authorities) <= MAX_SUB_AUTHORITIES):
        raise PeerError(TYPE, "a SID out of bounds")
    if any(not 0 <= number < 1 << 32 for number in sid.sub_authorities):
        raise PeerError(TYPE, "a SID whose numbers are out of bounds")
    count = len(sid.sub_authorities)
    numbers = (*sid.sub_authorities, *([0] * (MAX_SUB_AUTHORITIES - count)))
    return _HEAD.pack(REVISION, count, sid.authority.to_bytes(6, "big")) + struct.pack("<15I", *numbers)


def take_payload_sid(payload: bytes) -> Sid:
    """Parses a payload with a SID. PeerError if the kernel would reject it, or unused bytes are not 0."""
    if len(payload) != _PAYLOAD_SIZE:
        raise PeerError(TYPE, f"a SID of {len(payload)} bytes, {_PAYLOAD_SIZE} are right")
    revision, count, authority = _HEAD.unpack_from(payload)
    numbers = struct.unpack_from("<15I", payload, _HEAD.size)
    if revision != REVISION or count > MAX_SUB_AUTHORITIES:
        raise PeerError(TYPE, f"a SID of revision {revision} with {count} sub-authorities", 0)
    if any(numbers[count:]):
        raise PeerError(TYPE, "a SID with something behind its sub-authorities", _HEAD.size + 4 * count)
    return Sid(int.from_bytes(authority, "big"), numbers[:count])


def take_payload_id(payload: bytes) -> int:
    """Parses a payload with an id. PeerError unless it is 4 bytes long and the id is 0 to MAX_ID."""
    if len(payload) != _NUMBER.size:
        raise PeerError(TYPE, f"an id of {len(payload)} bytes, {_NUMBER.size} are right")
    number: int = _NUMBER.unpack(payload)[0]
    if number > MAX_ID:
        raise PeerError(TYPE, "an id out of bounds")
    return number


def check_request(body: bytes) -> None:
    """Checks the body of an Ask. PeerError if its description is malformed, or it has a callout."""
    take_description(take_plain_ask(TYPE, body))


def check_answer(asked: bytes, answer: bytes) -> None:
    """Checks the body of an Instance. `asked`: that of the Ask. PeerError unless the payload is an id for a SID or a
    SID for an id, and expires within MAX_EXPIRY seconds."""
    query = take_description(take_ask(asked).description)
    instance = take_limited(TYPE, answer, MAX_EXPIRY)
    if isinstance(query.subject, Sid):
        take_payload_id(instance.payload)
    else:
        take_payload_sid(instance.payload)


# --- the type ------------------------------------------------------------------------------------------------


KEY_TYPE = KeyType(
    TYPE,
    "SIDs and ids of users and groups that the kernel's CIFS client translates.",
    of_the_system(take_description),
    check_request,
    check_answer,
    patience=6.0,  # stat(2) blocks meanwhile; after a refusal the kernel shows the mount's ids
    patterns=(b"os:S-*", b"gs:S-*", b"oi:*", b"gi:*"),
    typical=(
        RequestedKey(b"cifs.idmap", b"os:S-1-5-21-1-2-3-1000"),
        RequestedKey(b"cifs.idmap", b"gs:S-1-5-32-544"),
        RequestedKey(b"cifs.idmap", b"oi:1000"),
        RequestedKey(b"cifs.idmap", b"gi:1000"),
    ),
    options=(Option("name", "NAME", "os:SID, gs:SID, oi:UID or gi:GID.", required=True),),
    described=by_name(TYPE, take_description),
    kernel=("CIFS can ask for SIDs and ids", "cifs", "CONFIG_CIFS_UPCALL"),
    package="upcall-idmap",
    of_the_system=True,
    network=True,  # winbind returns data of a domain controller; querying it needs no privilege
)

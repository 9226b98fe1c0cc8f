"""Parses descriptions of "cifs.spnego" keys, which the kernel's CIFS client requests, and packs their payloads.

    ver=0x2;host=HOST;ip4=ADDRESS;sec=krb5;uid=0x0;creduid=0x3e9;user=NAME;pid=0x164;upcall_target=mount
    payload: version u32, flags u32, key length u32, blob length u32 (little-endian), session key, SPNEGO blob

`user=` may be missing and so may `upcall_target=`, which newer kernels write. The kernel copies the names of host and
user as they were given to mount, semicolons included. It does not check the lengths in the payload: an empty key makes
it dereference NULL, and a blob longer than the payload makes it send kernel memory to the server.
Source: fs/smb/client/cifs_spnego.c and .h, sess.c, smb2pdu.c; cifs.upcall(8).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import NamedTuple

from upcall.core.errors import PeerError
from upcall.protocols.request_key.conf import RequestedKey
from upcall.protocols.request_key.key_type import KeyType, Option, Wanted
from upcall.protocols.request_key.messages import take_ask, take_instance

TYPE = "cifs.spnego"
VERSION = 2  # CIFS_SPNEGO_UPCALL_VERSION
MIN_KEY, MAX_KEY = 16, 64  # bytes; the least is SMB2_NTLMV2_SESSKEY_SIZE; Kerberos keys have at most 32
MIN_BLOB = 16
NOBODY = 0xFFFFFFFF  # (uid_t) -1

_HEAD = struct.Struct("<IIII")

# One expression for the whole description, in the kernel's order. It rejects repeated fields, and names that contain
# further fields.
_FIELDS = (
    rb"ver=0x(?P<version>[0-9a-f]{1,8})",
    rb";host=(?P<host>[A-Za-z0-9_.:%\[\]-]{1,255})",
    rb";(?:ip4=(?P<ip4>[0-9.]{7,15})|ip6=(?P<ip6>[0-9a-f:.]{2,45}))",
    rb";sec=(?P<sec>[a-z0-9]{1,16})",
    rb";uid=0x(?P<uid>[0-9a-f]{1,8})",
    rb";creduid=0x(?P<creduid>[0-9a-f]{1,8})",
    rb"(?:;user=(?P<user>[^;\0-\x1f\x7f]{0,256}))?",
    rb";pid=0x(?P<pid>[0-9a-f]{1,8})",
    rb"(?:;upcall_target=(?P<target>[a-z]{1,16}))?",
)
_DESCRIPTION = re.compile(b"".join(_FIELDS))


class Spnego(NamedTuple):
    """A parsed description: requests a Kerberos session with `host`, using the credentials of `creduid`."""

    host: str  # from the UNC name: a name or an address
    ip: str
    sec: str  # krb5, mskrb5, iakerb
    uid: int  # uid that mounted the share
    creduid: int
    user: str | None  # the mount option user=; not verified
    pid: int  # of the requester, in the initial pid namespace
    target: str | None  # whose namespaces to use: "mount" or "app"


def take_description(text: bytes) -> Spnego:
    """Parses a description. PeerError if it does not have exactly the kernel's format."""
    found = _DESCRIPTION.fullmatch(text)
    if found is None:
        raise PeerError("cifs.spnego", "the description is not what a kernel writes", _fits_until(text))
    version = int(found["version"], 16)
    if version != VERSION:
        raise PeerError("cifs.spnego", f"version {version}, {VERSION} is known", 0)
    creduid, pid = int(found["creduid"], 16), int(found["pid"], 16)
    if creduid == NOBODY or not 0 < pid < 1 << 31:
        raise PeerError(
            "cifs.spnego", f"creduid {creduid:#x} or pid {pid:#x} is out of bounds", found.start("creduid")
        )
    user, target = found["user"], found["target"]
    try:
        name = None if user is None else user.decode()
    except UnicodeDecodeError:
        raise PeerError("cifs.spnego", "the user's name is not UTF-8", found.start("user")) from None
    return Spnego(
        found["host"].decode("ascii"),
        (found["ip4"] or found["ip6"]).decode("ascii"),
        found["sec"].decode("ascii"),
        int(found["uid"], 16),
        creduid,
        name,
        pid,
        None if target is None else target.decode("ascii"),
    )


def pack_description(asked: Spnego) -> bytes:
    """Returns the description of a request, as the kernel writes it. PeerError if parsing it would not give the same
    values."""
    ip = f"{'ip6' if ':' in asked.ip else 'ip4'}={asked.ip}"
    user = "" if asked.user is None else f";user={asked.user}"
    target = "" if asked.target is None else f";upcall_target={asked.target}"
    who = f"uid={asked.uid:#x};creduid={asked.creduid:#x}{user};pid={asked.pid:#x}"
    text = f"ver={VERSION:#x};host={asked.host};{ip};sec={asked.sec};{who}{target}".encode()
    if take_description(text) != asked:
        raise PeerError("cifs.spnego", "the description would be read otherwise")
    return text


def pack_payload(key: bytes, blob: bytes) -> bytes:
    """Returns a key's payload. `key`: the session key, MIN_KEY to MAX_KEY bytes. `blob`: the SPNEGO token for the
    server, at least MIN_BLOB bytes. PeerError if a size is out of bounds. The payload is secret."""
    payload = _HEAD.pack(VERSION, 0, len(key), len(blob)) + key + blob
    check_payload(payload)
    return payload


def take_payload(payload: bytes) -> tuple[bytes, bytes]:
    """Parses a payload. Returns (session key, blob). PeerError if it is malformed; its text contains no payload
    bytes."""
    if len(payload) < _HEAD.size:
        raise PeerError("cifs.spnego payload", f"{len(payload)} bytes, at least {_HEAD.size} are needed")
    version, flags, key, blob = _HEAD.unpack_from(payload)
    if (version, flags) != (VERSION, 0):
        raise PeerError(
            "cifs.spnego payload", f"version {version} with flags {flags:#x}, {VERSION} with 0 is known", 0
        )
    if not MIN_KEY <= key <= MAX_KEY:
        raise PeerError("cifs.spnego payload", f"a session key of {key} bytes, {MIN_KEY} to {MAX_KEY} are right", 8)
    if blob < MIN_BLOB or _HEAD.size + key + blob != len(payload):
        raise PeerError("cifs.spnego payload", f"a blob of {blob} bytes in a payload of {len(payload)}", 12)
    return payload[_HEAD.size : _HEAD.size + key], payload[_HEAD.size + key :]


def check_payload(payload: bytes) -> None:
    """PeerError as `take_payload`."""
    take_payload(payload)


def check_request(body: bytes) -> None:
    """Checks the body of an Ask. PeerError if its description is malformed. The callout is not used."""
    take_description(take_ask(body).description)


def check_answer(asked: bytes, answer: bytes) -> None:
    """Checks the body of an Instance. PeerError if its payload is malformed. `asked` is not used."""
    take_payload(take_instance(answer).payload)


def _fits_until(text: bytes) -> int:
    """Returns the offset of the first field that does not match."""
    at = 0
    for field in _FIELDS:
        found = re.compile(field).match(text, at)
        if found is None:
            break
        at = found.end()
    return at


# --- the type ------------------------------------------------------------------------------------------------

_ANY_PID = 1  # a place holder: `upcall explain` has no requesting process, and checks none
_IPV4, _NO_ADDRESS = re.compile(r"[0-9.]{7,15}"), "0.0.0.0"  # noqa: S104 - a place holder in a text


def wanted(description: bytes) -> Wanted:
    found = take_description(description)
    return Wanted(found.creduid, found.pid)


def described(told: Mapping[str, str]) -> RequestedKey:
    """Builds the request for a mount of //host/... with cruid=uid. PeerError."""
    host = told["host"]
    ip = host if ":" in host or _IPV4.fullmatch(host) else _NO_ADDRESS
    asked = Spnego(host, ip, told.get("sec", "krb5"), 0, int(told["uid"]), told.get("user"), _ANY_PID, None)
    return RequestedKey(TYPE.encode(), pack_description(asked))


def _typical(end: bytes) -> RequestedKey:
    start = b"ver=0x2;host=any.invalid;ip4=192.0.2.1;sec=krb5;uid=0x0;creduid=0x3e9;user=any;pid=0x7ffffff"
    return RequestedKey(TYPE.encode(), start + end)


KEY_TYPE = KeyType(
    TYPE,
    "Kerberos sessions of the kernel's CIFS client.",
    wanted,
    check_request,
    check_answer,
    patience=8.0,  # this mount, and all others, block meanwhile; a slow KDC answers within seconds
    # Matches every description that the kernel writes, and takes precedence over cifs-utils' pattern "*".
    patterns=(b"ver=0x2;host=*",),
    typical=(_typical(b""), _typical(b";upcall_target=app"), _typical(b";upcall_target=mount")),
    options=(
        Option("host", "HOST", "the file server, as in the mount command.", required=True),
        Option("uid", "UID", "the user whose session it is.  [default: you]", is_uid=True),
        Option("sec", "SEC", "the mount option sec=.  [default: krb5]"),
        Option("user", "NAME", "the mount option user=."),
    ),
    described=described,
    kernel=("CIFS can ask for Kerberos tickets", "cifs", "CONFIG_CIFS_UPCALL"),
    package="upcall-spnego",
    machine=True,
)

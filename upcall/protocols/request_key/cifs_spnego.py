"""Parses descriptions of "cifs.spnego" keys, which the kernel's CIFS client requests, and packs their payloads.

    ver=0x2;host=HOST;ip4=ADDRESS;sec=krb5;uid=0x0;creduid=0x3e9;user=NAME;pid=0x164;upcall_target=mount
    payload: version u32, flags u32, key length u32, blob length u32 (little-endian), session key, SPNEGO blob

`user=` may be missing and so may `upcall_target=`, which newer kernels write. The kernel copies the names of host and
user as they were given to mount, semicolons included, and believes every length in the payload: a key of no bytes
makes it crash, a blob longer than the payload sends its memory to the server.
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
MIN_KEY, MAX_KEY = 16, 64  # SMB2_NTLMV2_SESSKEY_SIZE; Kerberos knows no key longer than 32
MIN_BLOB = 16
NOBODY = 0xFFFFFFFF  # (uid_t) -1

_HEAD = struct.Struct("<IIII")

# One expression for the whole, in the kernel's order, with nothing left over: a field that occurs twice, or a name
# that brings a field of its own, does not fit.
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
    """What the kernel wants: a Kerberos session with `host`, by the credentials of `creduid`."""

    host: str  # from the UNC name: a name or an address
    ip: str
    sec: str  # krb5, mskrb5, iakerb
    uid: int  # who mounted
    creduid: int
    user: str | None  # what mount was told; a wish, not an identity
    pid: int  # who asked, in the first pid namespace
    target: str | None  # whose namespaces are meant: mount, app


def take_description(text: bytes) -> Spnego:
    """What a description says. PeerError if it is not exactly what a kernel writes."""
    found = _DESCRIPTION.fullmatch(text)
    if found is None:
        raise PeerError("cifs.spnego", "the description is not what a kernel writes", _fits_until(text))
    version = int(found["version"], 16)
    if version != VERSION:
        raise PeerError("cifs.spnego", f"version {version}, {VERSION} is known", 0)
    creduid, pid = int(found["creduid"], 16), int(found["pid"], 16)
    if creduid == NOBODY or not 0 < pid < 1 << 31:
        raise PeerError("cifs.spnego", f"creduid {creduid:#x} and pid {pid:#x} are nobody's", found.start("creduid"))
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
    """What a kernel writes. PeerError for what it could not write so that it is read back as it was."""
    ip = f"{'ip6' if ':' in asked.ip else 'ip4'}={asked.ip}"
    user = "" if asked.user is None else f";user={asked.user}"
    target = "" if asked.target is None else f";upcall_target={asked.target}"
    who = f"uid={asked.uid:#x};creduid={asked.creduid:#x}{user};pid={asked.pid:#x}"
    text = f"ver={VERSION:#x};host={asked.host};{ip};sec={asked.sec};{who}{target}".encode()
    if take_description(text) != asked:
        raise PeerError("cifs.spnego", "the description would be read otherwise")
    return text


def pack_payload(key: bytes, blob: bytes) -> bytes:
    """What the kernel takes: the session key, and the token for the server."""
    payload = _HEAD.pack(VERSION, 0, len(key), len(blob)) + key + blob
    check_payload(payload)
    return payload


def take_payload(payload: bytes) -> tuple[bytes, bytes]:
    """(session key, blob). PeerError says what is wrong with it, and never what is in it."""
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
    take_payload(payload)


def check_request(body: bytes) -> None:
    """For the broker: what a daemon is asked."""
    take_description(take_ask(body).description)


def check_answer(asked: bytes, answer: bytes) -> None:
    """For the broker: what a daemon answered."""
    take_payload(take_instance(answer).payload)


def _fits_until(text: bytes) -> int:
    """Where the first field begins that does not fit."""
    at = 0
    for field in _FIELDS:
        found = re.compile(field).match(text, at)
        if found is None:
            break
        at = found.end()
    return at


# --- the type ------------------------------------------------------------------------------------------------

_ANY_PID = 1  # there is no process, and nobody looks for it
_IPV4, _NO_ADDRESS = re.compile(r"[0-9.]{7,15}"), "0.0.0.0"  # noqa: S104 - a place holder in a text


def wanted(description: bytes) -> Wanted:
    found = take_description(description)
    return Wanted(found.creduid, found.pid)


def described(told: Mapping[str, str]) -> RequestedKey:
    """For a mount of //host/... with cruid=uid."""
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
    patience=8.0,  # a mount hangs for as long, and with it every other one; a KDC that is slow answers within seconds
    # Less wild than the distribution's "*", and true of every key that a kernel describes.
    patterns=(b"ver=0x2;host=*",),
    typical=(_typical(b""), _typical(b";upcall_target=app"), _typical(b";upcall_target=mount")),
    options=(
        Option("host", "HOST", "the file server, as mount is told it.", required=True),
        Option("uid", "UID", "for whom.  [default: you]", is_uid=True),
        Option("sec", "SEC", "the mount option sec=.  [default: krb5]"),
        Option("user", "NAME", "the mount option user=."),
    ),
    described=described,
    kernel=("CIFS can ask for Kerberos tickets", "cifs", "CONFIG_CIFS_UPCALL"),
    machine=True,
)

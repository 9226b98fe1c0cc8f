"""Describes, for the template of a handler, how each type of keys is answered from a table."""

from __future__ import annotations

from typing import Final, NamedTuple


class Service(NamedTuple):
    """The parts of the template that differ. All are Python source, except `explain` and `reason`."""

    type: str  # the module of upcall.protocols.request_key
    imports: str
    answer: str
    description: str  # of a key that the table answers
    unknown: str  # of one that it does not
    payload: str
    explain: str  # a command that explains the answer for the first
    reason: str = "no-such-name"


_DNS: Final = Service(
    "dns_resolver",
    "Text, pack_text, take_description",
    '''TABLE = {"files.example.org": "192.0.2.10"}


def payload(description: bytes, callout: bytes) -> bytes | None:
    """The payload of the key that the kernel asks for; None if it is not known. `callout`: its options."""
    address = TABLE.get(take_description(description).name)
    return None if address is None else pack_text(Text((address,)))''',
    'b"files.example.org"',
    'b"others.example.org"',
    'b"192.0.2.10\\0"',
    "sudo upcall explain dns_resolver --name files.example.org",
)
_ID: Final = Service(
    "id_resolver",
    "pack_id, pack_name, take_description",
    '''USERS = {"alice@example.org": 5001}


def payload(description: bytes, callout: bytes) -> bytes | None:
    """The payload of the key that the kernel asks for; None if it is not known. `callout`: always empty."""
    asked = take_description(description)
    for name, uid in USERS.items():
        if not asked.group and asked.subject == name:
            return pack_id(uid)
        if not asked.group and asked.subject == uid:
            return pack_name(name)
    return None''',
    'b"uid:alice@example.org"',
    'b"uid:bob@example.org"',
    'b"5001\\0"',
    "sudo upcall explain id_resolver --name uid:alice@example.org",
)
_IDMAP: Final = Service(
    "cifs_idmap",
    "pack_id, pack_sid, take_description, take_sid",
    '''USERS = {"S-1-5-21-1-2-3-1000": 5001}


def payload(description: bytes, callout: bytes) -> bytes | None:
    """The payload of the key that the kernel asks for; None if it is not known. `callout`: always empty."""
    asked = take_description(description)
    for text, uid in USERS.items():
        sid = take_sid(text.encode())
        if not asked.group and asked.subject == sid:
            return pack_id(uid)
        if not asked.group and asked.subject == uid:
            return pack_sid(sid)
    return None''',
    'b"os:S-1-5-21-1-2-3-1000"',
    'b"os:S-1-5-21-1-2-3-1001"',
    '(5001).to_bytes(4, "little")',
    "sudo upcall explain cifs.idmap --name os:S-1-5-21-1-2-3-1000",
)
_SPNEGO: Final = Service(
    "cifs_spnego",
    "pack_payload, take_description",
    '''SESSIONS = {"files.example.org": (bytes(32), b"no real token...")}  # a session key, and a SPNEGO token


def payload(description: bytes, callout: bytes) -> bytes | None:
    """The payload of the key that the kernel asks for; None if there is no ticket. `callout`: always empty. In earnest
    both come from Kerberos: see upcall-spnego."""
    session = SESSIONS.get(take_description(description).host)
    return None if session is None else pack_payload(*session)''',
    'b"ver=0x2;host=files.example.org;ip4=192.0.2.10;sec=krb5;uid=0x0;creduid=0x1389;user=alice;pid=0x7ffffff"',
    'b"ver=0x2;host=others.example.org;ip4=192.0.2.11;sec=krb5;uid=0x0;creduid=0x1389;user=alice;pid=0x7ffffff"',
    'bytes.fromhex("02000000 00000000 20000000 10000000") + bytes(32) + b"no real token..."',
    "upcall explain cifs.spnego --host files.example.org",
    "no-ticket",
)

SERVICES: Final = {"cifs.idmap": _IDMAP, "cifs.spnego": _SPNEGO, "dns_resolver": _DNS, "id_resolver": _ID}

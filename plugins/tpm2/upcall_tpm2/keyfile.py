"""Packs and parses key files, `-----BEGIN TSS2 PRIVATE KEY-----`, the common format of TPM keys. Pure.

    TPMKey ::= SEQUENCE {
        type       OBJECT IDENTIFIER,                 -- 2.23.133.10.1.5: sealed data
        emptyAuth  [0] EXPLICIT BOOLEAN OPTIONAL,     -- TRUE: no PIN
        policy     [1] EXPLICIT SEQUENCE OF TPMPolicy OPTIONAL,
        parent     INTEGER,                           -- 0x40000001: the owner's storage primary key, or a handle
        pubkey     OCTET STRING,                      -- TPM2B_PUBLIC
        privkey    OCTET STRING                       -- TPM2B_PRIVATE
    }
    TPMPolicy ::= SEQUENCE { commandCode [0] EXPLICIT INTEGER, commandPolicy [1] EXPLICIT OCTET STRING }

Source: "ASN.1 Specification for TPM 2.0 Key Files" (J. Bottomley). Its other optional
fields are not supported. DER is parsed strictly: only the output of `pack_key_file` is accepted.
"""

from __future__ import annotations

import base64
import binascii
import textwrap
from typing import NamedTuple

from upcall.core.errors import PeerError
from upcall_tpm2.sealed import (
    CC_POLICY_AUTH_VALUE,
    CC_POLICY_PCR,
    DIGEST,
    Pcrs,
    Sealed,
    check_attributes,
    pack_pcrs,
    policy_of,
    take_pcrs,
    take_sealed,
)

WHAT = "TSS2 key file"
BEGIN, END = b"-----BEGIN TSS2 PRIVATE KEY-----", b"-----END TSS2 PRIVATE KEY-----"
OWNER = 0x40000001  # TPM_RH_OWNER
PERSISTENT = range(0x81000000, 0x82000000)
MAX_FILE = 8192  # bytes

_SEALED_KEY = bytes.fromhex("678105 0a01 05")  # 2.23.133.10.1.5
_BOOLEAN, _INTEGER, _OCTETS, _OID, _SEQUENCE, _TAG0, _TAG1 = 0x01, 0x02, 0x04, 0x06, 0x30, 0xA0, 0xA1
_TRUE = b"\xff"


class KeyFile(NamedTuple):
    """A sealed object, with what is needed to unseal it."""

    parent: int  # OWNER, or a persistent handle
    public: bytes  # TPM2B_PUBLIC
    private: bytes  # TPM2B_PRIVATE: encrypted by the TPM
    pin: bool
    pcrs: Pcrs | None
    values: bytes  # SHA-256 over the required values of the PCRs; empty without PCRs

    def sealed(self) -> Sealed:
        return take_sealed(self.public)


# --- writing -------------------------------------------------------------------------------------------------


def pack_key_file(key: KeyFile) -> bytes:
    """Returns the text of a key file."""
    fields = [_pack(_OID, _SEALED_KEY)]
    if not key.pin:
        fields.append(_pack(_TAG0, _pack(_BOOLEAN, _TRUE)))
    if key.pcrs is not None:
        told = len(key.values).to_bytes(2, "big") + key.values + pack_pcrs(key.pcrs)
        policy = _pack_policy(CC_POLICY_PCR, told)
        policy += _pack_policy(CC_POLICY_AUTH_VALUE, b"") if key.pin else b""
        fields.append(_pack(_TAG1, _pack(_SEQUENCE, policy)))
    fields += [_pack_number(key.parent), _pack(_OCTETS, key.public), _pack(_OCTETS, key.private)]
    text = base64.b64encode(_pack(_SEQUENCE, b"".join(fields))).decode("ascii")
    return b"\n".join([BEGIN, *(line.encode("ascii") for line in textwrap.wrap(text, 64)), END, b""])


def _pack_policy(code: int, told: bytes) -> bytes:
    return _pack(_SEQUENCE, _pack(_TAG0, _pack_number(code)) + _pack(_TAG1, _pack(_OCTETS, told)))


def _pack_number(number: int) -> bytes:
    return _pack(_INTEGER, number.to_bytes(number.bit_length() // 8 + 1, "big"))


def _pack(tag: int, content: bytes) -> bytes:
    size = len(content)
    if size < 0x80:
        return bytes((tag, size)) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(length))) + length + content


# --- reading -------------------------------------------------------------------------------------------------


def take_key_file(text: bytes) -> KeyFile:
    """Parses the text of a key file. PeerError if it is malformed.

    The policy in the file must match the object's policy digest, so a manipulated file is detected.
    """
    outer = _Der(_take_pem(text))
    fields = _Der(outer.take(_SEQUENCE, "key"))
    outer.end()
    if fields.take(_OID, "type") != _SEALED_KEY:
        raise PeerError(WHAT, "holds a TPM key, but no sealed data")
    pin = not (fields.next() == _TAG0 and _take_true(fields.take(_TAG0, "emptyAuth")))
    pcrs, values = _take_policy(fields.take(_TAG1, "policy"), pin) if fields.next() == _TAG1 else (None, b"")
    parent = fields.number("parent")
    public, private = fields.take(_OCTETS, "pubkey"), fields.take(_OCTETS, "privkey")
    fields.end()
    if parent != OWNER and parent not in PERSISTENT:
        raise PeerError(WHAT, f"its parent {parent:#x} is neither the owner's nor persistent")
    if len(private) < 2 or int.from_bytes(private[:2], "big") != len(private) - 2:
        raise PeerError(WHAT, "the private part has the wrong size")
    sealed = take_sealed(public)
    check_attributes(sealed, pin)
    if sealed.policy != policy_of(pcrs, values, pin):
        raise PeerError(WHAT, "the policy in the file is not that of the sealed object")
    return KeyFile(parent, public, private, pin, pcrs, values)


def _take_pem(text: bytes) -> bytes:
    lines = text.replace(b"\r\n", b"\n").strip().split(b"\n")
    if len(lines) < 3 or lines[0] != BEGIN or lines[-1] != END:
        raise PeerError(WHAT, f"is not one block from {BEGIN.decode()} to {END.decode()}")
    try:
        return base64.b64decode(b"".join(lines[1:-1]), validate=True)
    except binascii.Error:
        raise PeerError(WHAT, "its base64 is damaged") from None


def _take_true(data: bytes) -> bool:
    inner = _Der(data)
    value = inner.take(_BOOLEAN, "emptyAuth")
    inner.end()
    if value not in (_TRUE, b"\0"):
        raise PeerError(WHAT, "emptyAuth is neither true nor false")
    return value == _TRUE


def _take_policy(data: bytes, pin: bool) -> tuple[Pcrs, bytes]:
    """Parses a policy: PCRs, then the PIN if there is one. PeerError for other commands, or another order."""
    outer = _Der(data)
    steps = _Der(outer.take(_SEQUENCE, "policy"))
    outer.end()
    told = _take_step(steps, CC_POLICY_PCR)
    if pin and _take_step(steps, CC_POLICY_AUTH_VALUE):
        raise PeerError(WHAT, "PolicyAuthValue has no parameters")
    steps.end()
    if told[:2] != DIGEST.to_bytes(2, "big") or len(told) < 2 + DIGEST:
        raise PeerError(WHAT, "PolicyPCR without the digest of the values")
    return take_pcrs(told[2 + DIGEST :]), told[2 : 2 + DIGEST]


def _take_step(steps: _Der, wanted: int) -> bytes:
    step = _Der(steps.take(_SEQUENCE, "policy step"))
    code = _Der(step.take(_TAG0, "commandCode"))
    found = code.number("commandCode")
    code.end()
    told = _Der(step.take(_TAG1, "commandPolicy"))
    step.end()
    if found != wanted:
        raise PeerError(WHAT, f"a policy of command {found:#x} where {wanted:#x} is supported")
    parameters = told.take(_OCTETS, "commandPolicy")
    told.end()
    return parameters


class _Der:
    """Parses a sequence of DER values (X.690: definite lengths in their shortest form)."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def next(self) -> int:
        """Returns the tag of the next value; 0 at the end."""
        return self._data[self._at] if self._at < len(self._data) else 0

    def take(self, tag: int, what: str) -> bytes:
        if self.next() != tag:
            raise PeerError(WHAT, f"no {what}", self._at)
        size, at = self._length(what)
        if at + size > len(self._data):
            raise PeerError(WHAT, f"{what} of {size} bytes, {len(self._data) - at} are there", self._at)
        self._at = at + size
        return self._data[at : self._at]

    def _length(self, what: str) -> tuple[int, int]:
        """Returns the length of the next value, and the offset of its content. PeerError."""
        at = self._at + 1
        first = self._data[at] if at < len(self._data) else 0xFF
        if first < 0x80:
            return first, at + 1
        count = first & 0x7F
        length = self._data[at + 1 : at + 1 + count]
        size = int.from_bytes(length, "big")
        if not 1 <= count <= 2 or len(length) < count or length[0] == 0 or size < 0x80:
            raise PeerError(WHAT, f"the length of {what} is no length", at)
        return size, at + 1 + count

    def number(self, what: str) -> int:
        content = self.take(_INTEGER, what)
        number = int.from_bytes(content, "big")
        if not 1 <= len(content) <= 5 or content[0] & 0x80 or _pack_number(number)[2:] != content:
            raise PeerError(WHAT, f"{what} is no number of at most 32 bits")
        return number

    def end(self) -> None:
        if self._at != len(self._data):
            raise PeerError(WHAT, f"{len(self._data) - self._at} bytes too many", self._at)

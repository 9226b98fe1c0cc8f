"""Packs and parses public structures of sealed objects: public areas, PCR selections, policies. Pure; needs no TPM.

Numbers and layouts: TCG "TPM 2.0 Library", part 2 (structures: TPMT_PUBLIC, TPML_PCR_SELECTION) and part 3
(commands: PolicyPCR, PolicyAuthValue). All is big-endian.
"""

from __future__ import annotations

import hashlib
import re
import struct
from typing import NamedTuple

from upcall.core.errors import PeerError, UsageError

WHAT = "public area of a sealed object"

ALG_SHA256, ALG_SHA384, ALG_SHA512 = 0x000B, 0x000C, 0x000D
ALG_KEYEDHASH, ALG_NULL, ALG_ECC, ALG_AES, ALG_CFB, CURVE_P256 = 0x0008, 0x0010, 0x0023, 0x0006, 0x0043, 0x0003
BANKS = {"sha256": ALG_SHA256, "sha384": ALG_SHA384, "sha512": ALG_SHA512}
PCRS = 24  # a PC's TPM has PCRs 0 to 23

# TPMA_OBJECT
FIXED_TPM, FIXED_PARENT, DATA_ORIGIN, WITH_AUTH, NO_DA = 0x2, 0x10, 0x20, 0x40, 0x400
RESTRICTED, DECRYPT = 0x10000, 0x20000
FIXED = FIXED_TPM | FIXED_PARENT
STORAGE = FIXED | RESTRICTED | DECRYPT

CC_POLICY_AUTH_VALUE, CC_POLICY_PCR = 0x16B, 0x17F

DIGEST = 32  # SHA-256: of names and policies
_HEAD = struct.Struct(">HHI")  # type, nameAlg, objectAttributes
_SIZE = struct.Struct(">H")
_SELECTION = struct.Struct(">IHB3s")  # TPML_PCR_SELECTION of one bank: count, hash, sizeofSelect, bitmap

# The storage primary key: ECC P-256, AES-128-CFB, no authorisation, `unique` empty. It is derived from the owner's
# seed and the same after each boot. (TCG "Provisioning Guidance" 7.5.1; the primary template of TSS2 key files.)
STORAGE_TEMPLATE = _HEAD.pack(ALG_ECC, ALG_SHA256, STORAGE | DATA_ORIGIN | WITH_AUTH | NO_DA) + struct.pack(
    ">HHHHHHHHH", 0, ALG_AES, 128, ALG_CFB, ALG_NULL, CURVE_P256, ALG_NULL, 0, 0
)


class Pcrs(NamedTuple):
    """A selection of PCRs of one bank, in ascending order."""

    bank: str
    indexes: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.bank}:{','.join(map(str, self.indexes))}"


class Sealed(NamedTuple):
    """The public area of a sealed object."""

    attributes: int
    policy: bytes  # digest of its policy; empty without one
    name: bytes  # 34 bytes: nameAlg, and the hash of the public area


def parse_pcrs(text: str) -> Pcrs:
    """Parses a selection such as "sha256:7,11". UsageError."""
    found = re.fullmatch(r"([a-z0-9]+):([0-9]{1,2}(?:,[0-9]{1,2})*)", text)
    if found is None:
        raise UsageError(f"PCRs are given like sha256:7,11 and not like {text!r}")
    bank, indexes = found[1], sorted(map(int, found[2].split(",")))
    if bank not in BANKS:
        raise UsageError(f"PCRs of the bank {bank!r}: {', '.join(BANKS)} are possible")
    if indexes[-1] >= PCRS or len(set(indexes)) < len(indexes):
        raise UsageError(f"PCRs are numbers from 0 to {PCRS - 1}, each once: {text!r}")
    return Pcrs(bank, tuple(indexes))


def pack_pcrs(pcrs: Pcrs) -> bytes:
    """Packs a TPML_PCR_SELECTION."""
    bitmap = sum(1 << index for index in pcrs.indexes).to_bytes(3, "little")
    return _SELECTION.pack(1, BANKS[pcrs.bank], 3, bitmap)


def take_pcrs(data: bytes) -> Pcrs:
    """Parses a TPML_PCR_SELECTION that fills `data`. PeerError unless it has the form of `pack_pcrs`."""
    if len(data) != _SELECTION.size:
        raise PeerError("PCR selection", f"{len(data)} bytes, {_SELECTION.size} are needed")
    _, algorithm, _, bitmap = _SELECTION.unpack(data)
    bits = int.from_bytes(bitmap, "little")
    bank = next((bank for bank, number in BANKS.items() if number == algorithm), "")
    pcrs = Pcrs(bank, tuple(index for index in range(PCRS) if bits >> index & 1))
    if not bank or not bits or pack_pcrs(pcrs) != data:
        raise PeerError("PCR selection", "not of PCRs of one bank that is supported")
    return pcrs


def policy_of(pcrs: Pcrs | None, values: bytes, pin: bool) -> bytes:
    """Computes the policy digest: PolicyPCR with these PCRs and the digest of their values, then PolicyAuthValue if
    `pin`.

    Empty without PCRs: a PIN alone is the object's authorisation value and needs no policy.
    """
    if pcrs is None:
        return b""
    policy = hashlib.sha256(bytes(DIGEST) + CC_POLICY_PCR.to_bytes(4, "big") + pack_pcrs(pcrs) + values).digest()
    if pin:
        policy = hashlib.sha256(policy + CC_POLICY_AUTH_VALUE.to_bytes(4, "big")).digest()
    return policy


def pack_template(policy: bytes, pin: bool) -> bytes:
    """Packs a TPMT_PUBLIC, the template of a sealed object.

    Wrong PINs count towards the lock-out. An object without PIN sets noDA: it is not affected by a lock-out that
    others cause. With a policy, the authorisation value alone does not suffice for unsealing.
    """
    attributes = FIXED | (0 if policy else WITH_AUTH) | (0 if pin else NO_DA)
    head = _HEAD.pack(ALG_KEYEDHASH, ALG_SHA256, attributes)
    return head + _SIZE.pack(len(policy)) + policy + _SIZE.pack(ALG_NULL) + _SIZE.pack(0)


def take_sealed(data: bytes) -> Sealed:
    """Parses a TPM2B_PUBLIC that fills `data`. PeerError."""
    size = _SIZE.size + _HEAD.size
    if len(data) < size + _SIZE.size or _SIZE.unpack_from(data)[0] != len(data) - _SIZE.size:
        raise PeerError(WHAT, "its size is wrong", 0)
    kind, algorithm, attributes = _HEAD.unpack_from(data, _SIZE.size)
    if (kind, algorithm) != (ALG_KEYEDHASH, ALG_SHA256):
        raise PeerError(WHAT, f"of type {kind:#06x} and hash {algorithm:#06x}, not a sealed object", _SIZE.size)
    (length,) = _SIZE.unpack_from(data, size)
    if length not in (0, DIGEST):
        raise PeerError(WHAT, f"a policy of {length} bytes", size)
    policy, rest = data[size + 2 : size + 2 + length], data[size + 2 + length :]
    if len(rest) != 4 + DIGEST or struct.unpack_from(">HH", rest) != (ALG_NULL, DIGEST):
        raise PeerError(WHAT, "does not end like that of sealed data", size + 2 + length)
    name = ALG_SHA256.to_bytes(2, "big") + hashlib.sha256(data[_SIZE.size :]).digest()
    return Sealed(attributes, policy, name)


def check_attributes(found: Sealed, pin: bool) -> None:
    """PeerError unless the attributes bind the object to its TPM, enforce its policy, and protect its PIN by the
    lock-out."""
    if found.attributes & (FIXED | RESTRICTED | DECRYPT | DATA_ORIGIN) != FIXED:
        raise PeerError(WHAT, "could be moved to another TPM")
    if bool(found.attributes & WITH_AUTH) is bool(found.policy):
        raise PeerError(WHAT, "is not opened by its policy, if it has one, and only by that")
    if pin and found.attributes & NO_DA:
        raise PeerError(WHAT, "its PIN could be guessed without end")

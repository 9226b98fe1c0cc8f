"""Wraps keys with keys that a TPM 2.0 has sealed: unsealing needs this TPM, and the chosen PCR values and PIN.

The sealed key is an AES-256 key, which wraps with padding (AES-KWP, RFC 5649): 67 bytes become 80. The TPM unseals it
when the key is opened. It is kept in memory until the key is locked or its file changes, so a request takes
microseconds and does not use the TPM.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from cryptography.hazmat.primitives.keywrap import (
    InvalidUnwrap,
    aes_key_unwrap_with_padding,
    aes_key_wrap_with_padding,
)

from upcall.core.errors import ModuleFailed, PeerError, UsageError
from upcall.keymodule import API, Changing, Enrolled, Limits, Making, Parameter, Secrets
from upcall.keys.base import FileHandle, check_clear
from upcall.keys.private_file import Fingerprint, read_private, write_new
from upcall_tpm2.blob import Blob, check_tcti, pack_blob, take_blob
from upcall_tpm2.bounded import within
from upcall_tpm2.chip import KEY, Chip, Lockout, WrongPin, conversation
from upcall_tpm2.keyfile import MAX_FILE, OWNER, PERSISTENT, KeyFile, pack_key_file, take_key_file
from upcall_tpm2.sealed import Pcrs, parse_pcrs

__all__ = ["Handle", "Tpm2Module", "module", "signature_of"]

PATIENCE: Final = 8.0  # seconds, the time-out of a conversation; slow TPMs need one; the kernel's time-out is shorter
MIN_PIN, MAX_PIN = 4, 32  # bytes; a TPM's limit is the size of the name's hash
T = TypeVar("T")
_DOMAIN: Final = b"upcall tpm2 sealed key\0"

_TCTI = Parameter("tcti", "Where the TPM is.", "device:/dev/tpmrm0")


def signature_of(key: KeyFile) -> str:
    """Returns the signature, 16 hexadecimal digits: 8 bytes of SHA-256 over the sealed object's name, which is a hash
    of its whole public area."""
    return hashlib.sha256(_DOMAIN + key.sealed().name).digest()[:8].hex()


class Handle(FileHandle):
    """A KeyHandle of an unsealed key. Thread-safe: a lock serialises the verbs with `close`, which wipes the key."""

    def __init__(self, key: bytearray, path: str, found: Fingerprint) -> None:
        super().__init__(path, found)
        self._key: bytearray | None = key
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Handle({self._path!r}, {'closed' if self._key is None else 'open'})"

    def wrap(self, key: bytes, /) -> bytes:
        check_clear(key)
        with self._lock:
            return aes_key_wrap_with_padding(self._unlocked(), key)

    def unwrap(self, wrapped: bytes, /) -> bytes:
        with self._lock:
            try:
                return aes_key_unwrap_with_padding(self._unlocked(), wrapped)
            except (InvalidUnwrap, ValueError):  # ValueError: of cryptography 48, for some lengths
                pass
        raise ModuleFailed(f"{self._path}: this key did not wrap these {len(wrapped)} bytes")

    def _unlocked(self) -> bytes:
        if self._key is None:
            raise ModuleFailed(f"{self._path}: the key has been locked")
        return self._key  # type: ignore[return-value] # callers accept any buffer

    def close(self) -> None:
        with self._lock:
            if self._key is not None:
                _wipe(self._key)
            self._key = None


class Tpm2Module:
    """A KeyModule, KeyMaker, KeyImporter and PassphraseChanger for keys sealed by a TPM 2.0. Thread-safe."""

    name = "tpm2"
    api = API
    suffix = ".tss2"
    takes_passphrase = False
    changes = "PIN"
    parameters: tuple[Parameter, ...] = (
        _TCTI,
        Parameter("pcrs", "Opens only while these PCRs hold what they hold now: sha256:7, say.", ""),
        Parameter("pin", "Whether a PIN is asked for.", "no", choices=("yes", "no")),
        Parameter("parent", "A persistent storage key, 81000001 say, instead of the owner's primary key.", ""),
    )
    import_parameters: tuple[Parameter, ...] = (_TCTI,)

    def open(self, signature: str, blob: bytes, secrets: Secrets, /) -> Handle:
        told, key, found = _take(signature, blob)
        unsealed, _ = _unseal(told.path, told.tcti, key, told.parent, secrets)
        return Handle(unsealed, told.path, found)

    def generate(self, making: Making, /) -> Enrolled:
        _check_limits(making.limits)
        path, tcti, pcrs, parent = _where(making.path), making.values["tcti"], None, OWNER
        check_tcti(tcti)
        if making.values["pcrs"]:
            pcrs = parse_pcrs(making.values["pcrs"])
        if making.values["parent"]:
            parent = _parse_parent(making.values["parent"])
        _ask(tcti, Chip.lockout)  # reports a missing TPM before the prompt for a PIN
        pin = _new_pin(path, making.secrets) if making.values["pin"] == "yes" else None
        try:
            key, name = _seal(tcti, parent, pcrs, pin)
        finally:
            _wipe(pin)
        blob = pack_blob(Blob(path, tcti, name))
        try:
            write_new(Path(path), pack_key_file(key))
        except OSError as error:
            raise ModuleFailed(f"{path}: {error.strerror}") from error
        return Enrolled(signature_of(key), blob, _describe(key))

    def import_key(self, making: Making, /) -> Enrolled:
        """Imports an existing key file: 32 bytes sealed by this TPM. Unseals it once as a check."""
        _check_limits(making.limits)
        path, tcti = _where(making.path), making.values["tcti"]
        check_tcti(tcti)
        key, _ = _read(path)
        unsealed, name = _unseal(path, tcti, key, None, making.secrets)
        _wipe(unsealed)
        return Enrolled(signature_of(key), pack_blob(Blob(path, tcti, name)), _describe(key))

    def change_passphrase(self, signature: str, blob: bytes, changing: Changing, /) -> bytes:
        """Changes the PIN: the TPM seals the same key anew, which keeps its PCRs and its signature."""
        told, key, _ = _take(signature, blob)
        if not key.pin:
            raise ModuleFailed(f"{told.path}: was made without a PIN, and cannot get one: make another key")
        _check_pin(changing.passphrase)
        new = _by_pin(told.path, told.tcti, changing.secrets, lambda pin: _change_pin(told, key, pin, changing))
        try:
            write_new(changing.path, pack_key_file(new))
        except OSError as error:
            raise ModuleFailed(f"{changing.path}: {error.strerror}") from error
        return blob


def _take(signature: str, blob: bytes) -> tuple[Blob, KeyFile, Fingerprint]:
    """Reads the key file that a blob names, and verifies that it holds the key of this signature. ModuleFailed."""
    try:
        told = take_blob(blob)
    except PeerError as error:
        raise ModuleFailed(str(error)) from error
    key, found = _read(told.path)
    if (theirs := signature_of(key)) != signature:
        raise ModuleFailed(f"{told.path}: holds the key {theirs}, the auth token is for {signature}")
    return told, key, found


# --- the TPM -------------------------------------------------------------------------------------------------


def _ask(tcti: str, work: Callable[[Chip], T], drop: Callable[[T], None] = lambda _: None) -> T:
    """Runs `work` in one conversation with the TPM. ModuleFailed after PATIENCE seconds. `drop`: see `within`."""

    def converse() -> T:
        with conversation(tcti) as chip:
            return work(chip)

    return within(PATIENCE, f"the TPM at {tcti}", converse, drop)


def _seal(tcti: str, parent: int, pcrs: Pcrs | None, pin: bytearray | None) -> tuple[KeyFile, bytes]:
    """Seals a new key, and checks it by unsealing. Returns it and the storage key's name. ModuleFailed."""
    secret, again = bytearray(os.urandom(KEY)), bytearray()
    try:
        key, name = _ask(tcti, lambda chip: chip.seal(parent, secret, pcrs, pin))
        again, _ = _ask(tcti, lambda chip: chip.unseal(key, name, pin), _drop)
        if again != secret:
            raise ModuleFailed(f"{tcti}: the TPM gives back another key than was sealed")
    finally:
        _wipe(secret)
        _wipe(again)
    return key, name


def _unseal(path: str, tcti: str, key: KeyFile, trusted: bytes | None, secrets: Secrets) -> tuple[bytearray, bytes]:
    """Returns the key, which the caller wipes, and the storage key's name. Asks for a PIN only if the TPM would check
    it: not during its lock-out. ModuleFailed, Refused."""
    if not key.pin:
        return _ask(tcti, lambda chip: chip.unseal(key, trusted, None), _drop)
    return _by_pin(path, tcti, secrets, lambda pin: _unseal_by(tcti, key, trusted, pin))


def _by_pin(path: str, tcti: str, secrets: Secrets, work: Callable[[bytearray], T]) -> T:
    """Calls `work` with the key's PIN, and reports whether the TPM has accepted it. ModuleFailed, Refused."""
    lockout = _ask(tcti, Chip.lockout)
    lockout.check(tcti)
    token = _token(path)
    pin = secrets.pin(token, _prompt(path, lockout))
    try:
        if not 1 <= len(pin) <= MAX_PIN:  # certainly wrong: avoids an attempt that the TPM counts
            raise WrongPin(f"{path}: wrong PIN")
        result = work(pin)
    except WrongPin as error:
        secrets.verdict(token, False)
        raise WrongPin(f"{error}{_tries_left(tcti)}") from None
    finally:
        _wipe(pin)
    secrets.verdict(token, True)
    return result


def _unseal_by(tcti: str, key: KeyFile, trusted: bytes | None, pin: bytearray) -> tuple[bytearray, bytes]:
    """Unseals with a copy of the PIN: after a time-out the caller wipes its own, and a TPM that responds later must
    not receive a wiped, wrong PIN."""
    own = bytearray(pin)

    def work(chip: Chip) -> tuple[bytearray, bytes]:
        try:
            return chip.unseal(key, trusted, own)
        finally:
            _wipe(own)

    return _ask(tcti, work, _drop)


def _change_pin(told: Blob, key: KeyFile, pin: bytearray, changing: Changing) -> KeyFile:
    """Changes the PIN, with copies of both, as above."""
    old, new = bytearray(pin), bytearray(changing.passphrase)

    def work(chip: Chip) -> KeyFile:
        try:
            return chip.change_pin(key, told.parent, old, new)
        finally:
            _wipe(old)
            _wipe(new)

    return _ask(told.tcti, work)


def _drop(unsealed: tuple[bytearray, bytes]) -> None:
    _wipe(unsealed[0])


# --- people --------------------------------------------------------------------------------------------------


def _token(path: str) -> str:
    """Returns the name of the PIN for prompts: the key file's, because each key of a TPM has a PIN of its own."""
    return f"tpm2 {path}"


def _prompt(path: str, lockout: Lockout) -> str:
    left = max(1, lockout.allowed - lockout.wrong)
    return f"PIN of the TPM key {Path(path).name}" + (f" ({left} left before the TPM locks)" if lockout.wrong else "")


def _tries_left(tcti: str) -> str:
    """Returns how many wrong PINs the TPM takes until it locks, as the end of a sentence; "" if it does not say."""
    try:
        lockout = _ask(tcti, Chip.lockout)
    except ModuleFailed:
        return ""
    left = lockout.allowed - lockout.wrong
    if lockout.locked or left < 1:
        return f", and the TPM is locked out now; it forgets one every {lockout.interval} s"
    return f", {left} more before the TPM locks"


def _new_pin(path: str, secrets: Secrets) -> bytearray:
    pin = secrets.pin(_token(path), f"New PIN of the TPM key {Path(path).name}")
    try:
        _check_pin(pin)
    except UsageError:
        _wipe(pin)
        raise
    return pin


def _check_pin(pin: bytearray) -> None:
    """UsageError unless this can be a new PIN."""
    if not MIN_PIN <= len(pin) <= MAX_PIN or pin.endswith(b"\0"):
        raise UsageError(f"a PIN of {len(pin)} bytes: {MIN_PIN} to {MAX_PIN} are possible")


def _describe(key: KeyFile) -> str:
    return "TPM, AES-256" + (", PIN" if key.pin else "") + (f", PCRs {key.pcrs}" if key.pcrs else "")


# --- arguments and files -------------------------------------------------------------------------------------


def _check_limits(limits: Limits) -> None:
    longest = (limits.key + 7) // 8 * 8 + 8
    if longest > limits.wrapped:
        raise UsageError(f"a key of {limits.key} bytes becomes {longest}, and there is room for {limits.wrapped}")


def _parse_parent(text: str) -> int:
    with contextlib.suppress(ValueError):
        if (parent := int(text, 16)) in PERSISTENT:
            return parent
    raise UsageError(f"a persistent handle is a number from 81000000 to 81ffffff, and not {text!r}")


def _where(path: Path) -> str:
    return os.path.abspath(path)  # noqa: PTH100  resolve() would follow symbolic links


def _read(path: str) -> tuple[KeyFile, Fingerprint]:
    try:
        text, found = read_private(path, MAX_FILE)
        return take_key_file(bytes(text)), found
    except OSError as error:
        raise ModuleFailed(f"{path}: {error.strerror}") from error
    except PeerError as error:
        raise ModuleFailed(f"{path}: is damaged, or not one of ours: {error}") from error


def _wipe(buffer: bytearray | None) -> None:
    """Overwrites a buffer with zeros. Copies made by libraries or the interpreter remain."""
    if buffer is not None:
        buffer[:] = bytes(len(buffer))


module = Tpm2Module()

"""Implements the handle of an open key: the public half is in memory, the private half in the token."""

from __future__ import annotations

import weakref

import pkcs11
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pkcs11 import ObjectClass

from upcall.core.errors import ModuleFailed, UsageError
from upcall.keymodule import MAX_KEY, Secrets
from upcall_pkcs11 import objects
from upcall_pkcs11.blob import Flags, Scheme
from upcall_pkcs11.pins import AskedPins, FilePins, Pins
from upcall_pkcs11.schemes import NotOurs, PublicKey, name_of, wrapping
from upcall_pkcs11.token import Lost, Token
from upcall_pkcs11.uri import Uri

_NOT_OURS = (
    pkcs11.DataInvalid,
    pkcs11.DataLenRange,
    pkcs11.EncryptedDataInvalid,
    pkcs11.EncryptedDataLenRange,
)
_UNCLEAR = (pkcs11.GeneralError, pkcs11.FunctionFailed)  # SoftHSM: wrong padding, or other faults


def pins_for(uri: Uri, secrets: Secrets) -> Pins:
    return AskedPins(secrets) if uri.pin_file is None else FilePins(uri.pin_file)


class Handle:
    """A KeyHandle that wraps without the token and unwraps in it. Thread-safe: one thread at a time uses the token.

    Opens a lost session again, with a login, once for each call. Releases the token (see `use`) when it is closed or
    garbage-collected.
    """

    def __init__(
        self, token: Token, uri: Uri, public: PublicKey, scheme: Scheme, flags: Flags, secrets: Secrets
    ) -> None:
        self._token, self._uri, self._public, self._flags, self._secrets = token, uri, public, flags, secrets
        self._wrapping = wrapping(public, scheme)
        self._pins = pins_for(uri, secrets)
        self._private: pkcs11.PrivateKey | None = None
        self._era = 0  # of the session that `_private` belongs to
        self._end = weakref.finalize(self, token.release)

    def __repr__(self) -> str:
        return f"Handle({self._uri}, {name_of(self._public)})"

    def wrap(self, key: bytes, /) -> bytes:
        if not 1 <= len(key) <= MAX_KEY or not self._wrapping.size(len(key)):
            raise ModuleFailed(f"{len(key)} bytes to wrap, 1 to {MAX_KEY} are possible")
        return self._wrapping.wrap(key)

    def unwrap(self, wrapped: bytes, /) -> bytes:
        try:
            self._wrapping.check(wrapped)
            try:
                return self._unwrap(wrapped)
            except Lost as lost:
                self._token.drop(lost.era)
            return self._unwrap(wrapped)
        except NotOurs:
            raise ModuleFailed(f"{self._uri}: this key did not wrap these {len(wrapped)} bytes") from None
        except Lost:
            raise ModuleFailed(f"{self._token}: its session was lost again at once") from None

    def _unwrap(self, wrapped: bytes) -> bytes:
        self._token.log_in(self._pins)
        if self._flags & Flags.TOUCH:
            self._secrets.touch(self._token.id, f"Touch the {self._token}")
        with self._token.session() as session:
            private = self._find(session)
            try:
                return self._wrapping.unwrap(private, wrapped)
            except _NOT_OURS:
                raise NotOurs from None
            except _UNCLEAR:
                if self._token.there():
                    raise NotOurs from None
                raise

    def _find(self, session: pkcs11.Session) -> pkcs11.PrivateKey:
        if self._private is None or self._era != self._token.era:
            found = objects.find(session, ObjectClass.PRIVATE_KEY, self._uri)
            if not found and not self._token.there():
                raise Lost(self._token.era)
            if len(found) != 1:
                raise ModuleFailed(f"{self._uri}: the token has {len(found)} such private keys")
            self._private, self._era = found[0], self._token.era  # type: ignore[assignment]
        return self._private  # type: ignore[return-value]

    def change_pin(self, new: bytearray) -> None:
        """Changes the token's user PIN. UsageError if the token does not take the new one; ModuleFailed."""
        if self._uri.pin_file is not None:
            raise UsageError(
                f"{self._token}: its PIN is read from {self._uri.pin_file}: change both with its own tool"
            )
        try:
            self._token.change_pin(self._pins, new)
        except Lost:
            raise ModuleFailed(f"{self._token}: was taken out, or its session was lost") from None

    def stale(self) -> bool:
        """Returns whether the token is known to be removed. Opening the key again then fails, or finds the token."""
        return not self._end.alive or self._token.gone()

    def close(self) -> None:
        """Releases the token. Closing the last key of a token logs out."""
        self._end()

    def export_public(self) -> bytes:
        return self._public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

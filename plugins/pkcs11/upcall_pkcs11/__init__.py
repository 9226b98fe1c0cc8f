"""Wraps keys with key pairs in PKCS #11 tokens: smart cards, YubiKeys, HSMs, SoftHSM.

Wrapping uses the public half, which is read when the key is opened. Unwrapping logs in to the token with a PIN that a
person types. The private half never leaves the token.
"""

from __future__ import annotations

from pkcs11 import ObjectClass

from upcall.core.errors import ModuleFailed, PeerError
from upcall.keymodule import API, Changing, Enrolled, Making, Parameter, Secrets
from upcall_pkcs11 import enrolment, objects
from upcall_pkcs11.blob import Blob, Flags, take_blob
from upcall_pkcs11.handle import Handle, pins_for
from upcall_pkcs11.library import load, name_of_token
from upcall_pkcs11.schemes import PublicKey, signature_of
from upcall_pkcs11.token import Lost, Token, use

__all__ = ["Handle", "Pkcs11Module", "module"]

_URI = "Which key, by RFC 7512: pkcs11:token=NAME;object=LABEL?module-path=/usr/lib/LIBRARY.so"
_HASH = Parameter("hash", "Of RSA-OAEP; sha1 is what ecryptfs-utils has.", "sha1", choices=("sha1", "sha256"))
_TOUCH = Parameter("touch", "Whether the token waits for a touch.", "no", choices=("no", "yes"))


class Pkcs11Module:
    """A KeyModule, KeyMaker, KeyImporter and PassphraseChanger for keys in PKCS #11 tokens. Thread-safe."""

    name = "pkcs11"
    api = API
    suffix = ""
    takes_passphrase = False
    changes = "PIN"
    parameters: tuple[Parameter, ...] = (
        Parameter("uri", _URI),
        Parameter("type", "Kind of key.", "rsa", choices=("rsa", "ec")),
        Parameter("bits", "Size of an RSA key.", "3072", choices=("2048", "3072", "4096")),
        Parameter("curve", "Of an EC key.", "p-256", choices=("p-256", "p-384")),
        _HASH,
        _TOUCH,
    )
    import_parameters: tuple[Parameter, ...] = (Parameter("uri", _URI), _HASH, _TOUCH)

    def open(self, signature: str, blob: bytes, secrets: Secrets, /) -> Handle:
        """Reads the public half from the token. Asks for a PIN only if the token hides its public objects."""
        try:
            told = take_blob(blob)
        except PeerError as error:
            raise ModuleFailed(str(error)) from error
        library = load(str(told.uri.module_path))
        found = library.tokens(told.uri)
        if len(found) != 1:
            raise ModuleFailed(f"{told.uri}: " + ("the token is not there" if not found else "more than one token"))
        token = use(library, name_of_token(found[0]))
        try:
            public = _public(token, told, signature, secrets)
            return Handle(token, told.uri, public, told.scheme, told.flags, secrets)
        except BaseException as error:
            token.release()
            if isinstance(error, Lost):
                raise ModuleFailed(f"{token}: its session was lost again at once") from None
            raise

    def generate(self, making: Making, /) -> Enrolled:
        """Makes a key pair in the token: sensitive, not extractable. ModuleFailed, UsageError, Refused."""
        return enrolment.generate(making)

    def import_key(self, making: Making, /) -> Enrolled:
        """Imports a key pair that is in the token, where it stays. ModuleFailed, UsageError, Refused."""
        return enrolment.import_key(making)

    def change_passphrase(self, signature: str, blob: bytes, changing: Changing, /) -> bytes:
        """Changes the token's user PIN, which all its keys share. The token does it at once, or not at all."""
        handle = self.open(signature, blob, changing.secrets)
        try:
            handle.change_pin(changing.passphrase)
        finally:
            handle.close()
        return blob


def _public(token: Token, told: Blob, signature: str, secrets: Secrets) -> PublicKey:
    """Reads the public half of the key with this signature. Opens a lost session again, once."""
    if told.flags & Flags.LOGIN_FIRST:
        token.log_in(pins_for(told.uri, secrets))
    try:
        found = _read(token, told)
    except Lost as lost:
        token.drop(lost.era)
        if told.flags & Flags.LOGIN_FIRST:
            token.log_in(pins_for(told.uri, secrets))
        found = _read(token, told)
    for public in found:
        if signature_of(public, told.scheme) == signature:
            return public
    what = "is another key than that of the auth token" if found else "the token does not show such a public key"
    raise ModuleFailed(f"{told.uri}: {what}")


def _read(token: Token, told: Blob) -> list[PublicKey]:
    with token.session() as session:
        found = objects.find_public(session, told.uri)
        if not found and not token.there():
            raise Lost(token.era)
        if found or not told.flags & Flags.LOGIN_FIRST:
            return [public.key for public in found]
        private = objects.find(session, ObjectClass.PRIVATE_KEY, told.uri)
        return [key for one in private if (key := objects.read_public(one)) is not None]


module = Pkcs11Module()

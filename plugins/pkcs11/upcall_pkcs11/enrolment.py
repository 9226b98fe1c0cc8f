"""Makes and imports keys in tokens. Checks at enrolment everything that could fail later."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pkcs11
from pkcs11 import Attribute, ObjectClass

from upcall.core.errors import ModuleFailed, PeerError, UsageError
from upcall.keymodule import Enrolled, Making
from upcall_pkcs11 import objects
from upcall_pkcs11.blob import Blob, Flags, Scheme, pack_blob
from upcall_pkcs11.handle import Handle, pins_for
from upcall_pkcs11.library import Library, TokenName, load, name_of_token
from upcall_pkcs11.schemes import PublicKey, check_limits, name_of, scheme_of, signature_of, wrapping
from upcall_pkcs11.token import Lost, Token, use
from upcall_pkcs11.uri import Uri, parse_uri

EXPONENT = b"\x01\x00\x01"


def generate(making: Making) -> Enrolled:
    uri = _key_uri(making)
    if uri.object is None:
        raise UsageError("the URI of a new key needs object=LABEL")
    library = load(str(uri.module_path))
    with _using(library, _one([name_of_token(token) for token in library.tokens(uri)], uri)) as token:
        token.log_in(pins_for(uri, making.secrets))
        new = uri._replace(id=uri.id or os.urandom(16))
        with token.session(writing=True) as session:
            for taken in (Uri(object=new.object), Uri(id=new.id)):
                if any(
                    objects.find(session, kind, taken) for kind in (ObjectClass.PRIVATE_KEY, ObjectClass.PUBLIC_KEY)
                ):
                    raise ModuleFailed(f"{new}: is there already")
            pair = _make(session, new, making.values)
            try:
                enrolled = _enrol(token, session, pair[1], uri, making)
            except BaseException:
                for half in pair:
                    with contextlib.suppress(pkcs11.PKCS11Error):
                        half.destroy()
                raise
        return enrolled


def _make(session: pkcs11.Session, uri: Uri, values: Any) -> tuple[pkcs11.PublicKey, pkcs11.PrivateKey]:
    said: dict[str, Any] = {"id": uri.id, "label": uri.object, "store": True}
    private = {Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False, Attribute.PRIVATE: True}
    said |= {"private_template": private, "public_template": {Attribute.PRIVATE: False}}
    if values["type"] == "rsa":
        use_for = pkcs11.MechanismFlag.ENCRYPT | pkcs11.MechanismFlag.DECRYPT
        return session.generate_keypair(pkcs11.KeyType.RSA, int(values["bits"]), capabilities=use_for, **said)
    curve = {Attribute.EC_PARAMS: objects.CURVE_PARAMETERS[values["curve"]]}
    parameters = session.create_domain_parameters(pkcs11.KeyType.EC, curve, local=True)
    return parameters.generate_keypair(capabilities=pkcs11.MechanismFlag.DERIVE, **said)


def import_key(making: Making) -> Enrolled:
    uri = _key_uri(making)
    if uri.object is None and uri.id is None:
        raise UsageError("the URI needs object=LABEL or id=%XX")
    library = load(str(uri.module_path))
    with _using(library, _choose(library, uri)) as token:
        token.log_in(pins_for(uri, making.secrets))
        with token.session() as session:
            found = objects.find(session, ObjectClass.PRIVATE_KEY, uri)
            if len(found) != 1:
                raise _not_one(
                    [objects.uri_of(one, token.name.uri(library.path)) for one in found], uri, "private key"
                )
            return _enrol(token, session, found[0], uri, making)


# --- which token ---------------------------------------------------------------------------------------------


def _key_uri(making: Making) -> Uri:
    try:
        uri = parse_uri(making.values["uri"])
    except PeerError as error:
        raise UsageError(str(error)) from None
    if uri.module_path is None:
        raise UsageError("the URI needs ?module-path=/path/of/the/PKCS11/library.so")
    return uri


def _choose(library: Library, uri: Uri) -> TokenName:
    """Selects the token of a URI. If several match, the only one with a matching public object. ModuleFailed."""
    found = [name_of_token(token) for token in library.tokens(uri)]
    return _one(found if len(found) == 1 else _showing(library, found, uri) or found, uri)


def _showing(library: Library, names: list[TokenName], uri: Uri) -> list[TokenName]:
    showing = []
    for name in names:
        with _using(library, name) as token, token.session() as session:
            if objects.find(session, ObjectClass.PUBLIC_KEY, uri):
                showing.append(name)
    return showing


def _one(names: list[TokenName], uri: Uri) -> TokenName:
    if len(names) != 1:
        told = [_full(name, uri)._replace(object=uri.object, id=uri.id) for name in names]
        raise _not_one(told, uri, "token")
    return names[0]


def _full(name: TokenName, uri: Uri) -> Uri:
    """Completes a URI by the token's properties. Keeps the library's path as given, because symbolic links may later
    lead to a newer version."""
    return name.uri(str(uri.module_path))._replace(pin_file=uri.pin_file)


def _not_one(found: list[Uri], uri: Uri, what: str) -> ModuleFailed:
    if not found:
        return ModuleFailed(f"{uri}: there is no such {what}")
    return ModuleFailed(f"{uri}: more than one {what} fits:" + "".join(sorted(f"\n  {one}" for one in found)))


@contextlib.contextmanager
def _using(library: Library, name: TokenName) -> Iterator[Token]:
    token = use(library, name)
    try:
        yield token
    except Lost:
        raise ModuleFailed(f"{token}: was taken out, or its session was lost") from None
    finally:
        token.release()


# --- the key -------------------------------------------------------------------------------------------------


def _enrol(token: Token, session: pkcs11.Session, private: pkcs11.Object, uri: Uri, making: Making) -> Enrolled:
    """Enrols the key. Uses the session that found it and holds the lock, so that the key cannot change in between."""
    full = objects.uri_of(private, _full(token.name, uri))
    public, hidden = _public_half(session, private, full)
    scheme = scheme_of(public, making.values.get("hash", "sha1"))
    check_limits(public, scheme, making.limits)
    _check_private(private, wrapping(public, scheme).attribute, full)
    flags = Flags.LOGIN_FIRST if hidden else Flags(0)
    if making.values.get("touch") == "yes":
        flags |= Flags.TOUCH
    blob = pack_blob(Blob(full, scheme, flags))
    _self_test(token, full, public, scheme, flags, making)
    return Enrolled(signature_of(public, scheme), blob, f"{name_of(public)} in {token.name.label}")


def _public_half(session: pkcs11.Session, private: pkcs11.Object, uri: Uri) -> tuple[PublicKey, bool]:
    """Returns the public half, and whether reading it needs a login."""
    found = objects.find_public(session, uri)
    if len({signature_of(one.key, Scheme.ECDH_HKDF_SHA256_AES256_GCM) for one in found}) > 1:
        raise ModuleFailed(f"{uri}: the token has {len(found)} different public keys for it")
    if found:
        return found[0].key, all(one.private for one in found)
    public = objects.read_public(private) if objects.get(private, Attribute.KEY_TYPE) == pkcs11.KeyType.RSA else None
    if public is None:
        raise ModuleFailed(f"{uri}: no public key of RSA, P-256 or P-384 and no certificate goes with it")
    return public, True


def _check_private(private: pkcs11.Object, needed: Attribute, uri: Uri) -> None:
    if not objects.get(private, Attribute.TOKEN, True):
        raise ModuleFailed(f"{uri}: goes with the session, it is not kept in the token")
    if not objects.get(private, needed, False):
        raise ModuleFailed(f"{uri}: may not be used for this, CKA_{needed.name} is false")
    if objects.get(private, Attribute.ALWAYS_AUTHENTICATE, False):
        raise ModuleFailed(f"{uri}: wants its PIN again for every use (in PIV tokens, take the key of slot 9d)")


def _self_test(token: Token, uri: Uri, public: PublicKey, scheme: Scheme, flags: Flags, making: Making) -> None:
    """Wraps and unwraps a key of the longest size that the caller may pass. ModuleFailed."""
    handle = Handle(use(token.library, token.name), uri, public, scheme, flags, making.secrets)
    clear = os.urandom(making.limits.key)
    try:
        good = handle.unwrap(handle.wrap(clear)) == clear
    except ModuleFailed as error:
        raise ModuleFailed(f"the token cannot unwrap by {scheme.name}: {error}") from None
    finally:
        handle.close()
    if not good:
        raise ModuleFailed(f"{uri}: the token does not unwrap what the public key wrapped")

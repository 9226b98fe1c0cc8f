"""Finds key objects in a token, and reads public halves. The caller holds the session and its lock."""

from __future__ import annotations

from typing import Any, NamedTuple

import pkcs11
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from pkcs11 import Attribute, ObjectClass

from upcall.core.errors import ModuleFailed
from upcall_pkcs11.schemes import PublicKey
from upcall_pkcs11.uri import Uri

# DER of the object identifiers, as in CKA_EC_PARAMS
CURVE_PARAMETERS: dict[str, bytes] = {
    "p-256": bytes.fromhex("06082a8648ce3d030107"),
    "p-384": bytes.fromhex("06052b81040022"),
}
_CURVES: dict[bytes, ec.EllipticCurve] = {
    CURVE_PARAMETERS["p-256"]: ec.SECP256R1(),
    CURVE_PARAMETERS["p-384"]: ec.SECP384R1(),
}


class Public(NamedTuple):
    key: PublicKey
    private: bool  # can be read only after a login


def find(session: pkcs11.Session, kind: ObjectClass, uri: Uri) -> list[pkcs11.Object]:
    """Returns all objects of a class that match a URI."""
    wanted: dict[Attribute, Any] = {Attribute.CLASS: kind}
    if uri.object is not None:
        wanted[Attribute.LABEL] = uri.object
    if uri.id is not None:
        wanted[Attribute.ID] = uri.id
    return list(session.get_objects(wanted))


def get(thing: pkcs11.Object, attribute: Attribute, default: Any = None) -> Any:
    """Returns an attribute's value; the default if the object or token does not have it."""
    try:
        return thing[attribute]
    except (pkcs11.AttributeTypeInvalid, pkcs11.AttributeSensitive):
        return default


def uri_of(private: pkcs11.Object, token: Uri) -> Uri:
    """Returns the URI of an object: the token's, with the object's label and id if it has them."""
    label, ident = get(private, Attribute.LABEL), get(private, Attribute.ID)
    return token._replace(object=label or None, id=ident or None)


def find_public(session: pkcs11.Session, uri: Uri) -> list[Public]:
    """Returns the public halves of a private object: public keys and certificates with the same id, whatever their
    labels; without an id, those with the same label."""
    key = Uri(object=None if uri.id else uri.object, id=uri.id or None)
    found = [
        Public(public, bool(get(thing, Attribute.PRIVATE)))
        for thing in find(session, ObjectClass.PUBLIC_KEY, key)
        if (public := read_public(thing)) is not None
    ]
    if found:
        return found
    return [
        Public(public, bool(get(thing, Attribute.PRIVATE)))
        for thing in find(session, ObjectClass.CERTIFICATE, key)
        if (public := _read_certificate(get(thing, Attribute.VALUE, b""))) is not None
    ]


def read_public(thing: pkcs11.Object) -> PublicKey | None:
    """Reads the public half from a public key, or from an RSA private key, which contains it. None if its kind is not
    supported. ModuleFailed if it is malformed."""
    kind = get(thing, Attribute.KEY_TYPE)
    try:
        if kind == pkcs11.KeyType.RSA:
            modulus, exponent = get(thing, Attribute.MODULUS, b""), get(thing, Attribute.PUBLIC_EXPONENT, b"")
            return rsa.RSAPublicNumbers(int.from_bytes(exponent), int.from_bytes(modulus)).public_key()
        if kind == pkcs11.KeyType.EC:
            curve = _CURVES.get(get(thing, Attribute.EC_PARAMS, b""))
            point = _take_point(get(thing, Attribute.EC_POINT, b""))
            return None if curve is None else ec.EllipticCurvePublicKey.from_encoded_point(curve, point)
    except ValueError:
        raise ModuleFailed("the token holds a public key that is not sound") from None
    return None


def _take_point(value: bytes) -> bytes:
    """Returns the point of CKA_EC_POINT, a DER octet string. Some tokens omit the string's header."""
    if value[:1] == b"\x04" and value[1:2] and value[1] == len(value) - 2:
        return value[2:]
    return value


def _read_certificate(der: bytes) -> PublicKey | None:
    try:
        public = x509.load_der_x509_certificate(der).public_key()
    except ValueError:
        return None
    return public if isinstance(public, rsa.RSAPublicKey | ec.EllipticCurvePublicKey) else None

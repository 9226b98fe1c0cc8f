"""Fuzzes PKCS #11 URIs and their blobs, from auth tokens, command lines and configuration.

Raises only PeerError, which never quotes a value. A URI has one canonical form, which parses to the same values.
"""

from __future__ import annotations

from upcall_pkcs11.blob import Blob, Flags, Scheme, pack_blob, take_blob
from upcall_pkcs11.uri import parse_uri

from fuzz.target import holds, same, taken
from upcall.core.errors import PeerError

_URI = "pkcs11:token=lab;serial=12ab;object=files;id=%01?module-path=/usr/lib/softhsm/libsofthsm2.so"
SEEDS = [
    pack_blob(Blob(parse_uri(_URI), Scheme.RSA_OAEP_SHA256, Flags.TOUCH)),
    _URI.encode(),
    b"pkcs11:token=a%20b;type=private?pin-source=file:///run/pin&module-path=/m",
    b"pkcs11:pin-value=secretsecret",
]


def run(data: bytes) -> None:
    blob = taken(take_blob, data)
    if blob is not None:
        same(pack_blob(blob), data)
    text = data.decode("utf-8", "replace")
    try:
        uri = parse_uri(text)
    except PeerError as error:
        _, found, value = text.partition("pin-value=")
        holds(not found or len(value) < 12 or value not in str(error), "an error with a PIN in it")
        return
    if len(str(uri)) <= 1024:
        same(parse_uri(str(uri)), uri)

"""Fuzzes blobs, key files, PCR selections and public areas of the tpm2 module, from auth tokens and files.

Raises only PeerError (and UsageError for PCRs as text). A key file encodes back to the same text. No accepted TCTI
runs a command or loads a library.
"""

from __future__ import annotations

import hashlib
import os

from upcall_tpm2.blob import Blob, pack_blob, take_blob
from upcall_tpm2.keyfile import OWNER, KeyFile, pack_key_file, take_key_file
from upcall_tpm2.sealed import Pcrs, pack_pcrs, pack_template, parse_pcrs, policy_of, take_pcrs, take_sealed

from fuzz.target import holds, same, taken
from upcall.core.errors import UsageError

_VALUES = hashlib.sha256(bytes(64)).digest()


def _key_file(pin: bool, pcrs: Pcrs | None) -> KeyFile:
    values = _VALUES if pcrs else b""
    public = pack_template(policy_of(pcrs, values, pin), pin)[:-2] + b"\0\x20" + bytes(range(32))
    return KeyFile(OWNER, len(public).to_bytes(2, "big") + public, b"\0\4\1\2\3\4", pin, pcrs, values)


SEEDS = [
    *(pack_key_file(_key_file(pin, pcrs)) for pin in (True, False) for pcrs in (None, Pcrs("sha256", (7, 11)))),
    *(
        pack_blob(Blob("/k", tcti, bytes(34)))
        for tcti in ("device:/dev/tpmrm0", "swtpm:host=127.0.0.1,port=1", "tabrmd:")
    ),
    pack_pcrs(Pcrs("sha384", (0, 23))),
    b"sha256:7,11",
    _key_file(True, None).public,
]


def run(data: bytes) -> None:
    blob = taken(take_blob, data)
    if blob is not None:
        same(pack_blob(blob), data)
        kind, _, where = blob.tcti.partition(":")
        holds(kind in ("device", "swtpm", "mssim", "tabrmd"), "a TCTI that does more than talk")
        holds(kind != "device" or where.startswith("/dev/tpm"), "a device that is no TPM")
        os.fsencode(blob.path)
    key = taken(take_key_file, data)
    if key is not None:
        same(take_key_file(pack_key_file(key)), key)
    pcrs = taken(take_pcrs, data)
    if pcrs is not None:
        same(pack_pcrs(pcrs), data)
    taken(take_sealed, data)
    named = taken(parse_pcrs, data.decode("utf-8", "replace"), refuse=(UsageError,))
    if named is not None:
        same(parse_pcrs(str(named)), named)

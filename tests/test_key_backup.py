"""The file of `upcall key backup`: what is packed is taken, and nothing else."""

from __future__ import annotations

import base64
import datetime
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from upcall.core.errors import PeerError, UsageError
from upcall.keys import backup
from upcall.keys.backup import Cost, Kept, pack_backup, take_backup, take_content
from upcall.keys.store import COMPAT, Entry, text_of

WORD = b"correct horse"
CHEAP = Cost(8 * 1024, 1, 1)
WHEN = datetime.datetime(2025, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
ENTRY = Entry("work", "openssl", "80f0e50e8a936f95", "ask", "RSA-3072", WHEN, "/k/key.pem", b"blob", {"bits": "3072"})
KEYS = [
    Kept("work", ENTRY, b"a key file\0\xff", ".pem", None),
    Kept("old", ENTRY._replace(name="old", source=COMPAT, blob=None), b"another", "", None),
    Kept("words", ENTRY._replace(name="words", source="keyring", path=None), None, "", b"kept"),
]


def packed(keys: list[Kept] = KEYS) -> bytes:
    return pack_backup(keys, bytearray(WORD), CHEAP)


def taken(data: bytes, word: bytes = WORD) -> list[Kept]:
    return take_backup(data, bytearray(word), "/b")


def test_what_is_packed_is_taken_back() -> None:
    assert taken(packed()) == KEYS
    assert "a key file" not in repr(KEYS) and "kept" not in repr(KEYS)


def test_the_bytes_are_those_of_the_document() -> None:
    """Decrypts a backup by hand, as docs/backup.md has it."""
    data = packed()
    assert data[:16] == b"upcall-backup 1\n"
    memory, passes, lanes = int.from_bytes(data[16:20], "big"), data[20], data[21]
    salt, nonce, size = data[22:38], data[38:50], int.from_bytes(data[50:58], "big")
    assert (Cost(memory, passes, lanes), size) == (CHEAP, len(data) - 58)
    kdf = Argon2id(salt=salt, length=32, iterations=passes, lanes=lanes, memory_cost=memory, ad=b"upcall backup")
    told = json.loads(ChaCha20Poly1305(kdf.derive(WORD)).decrypt(nonce, data[58:], data[:58]))
    assert told["keys"][0] == {
        "name": "work",
        "entry": text_of(ENTRY).decode(),
        "file": base64.b64encode(b"a key file\0\xff").decode(),
        "suffix": ".pem",
    }
    assert told["keys"][2]["passphrase"] == base64.b64encode(b"kept").decode()


def test_two_backups_of_the_same_keys_share_no_salt_and_no_nonce() -> None:
    one, other = packed(), packed()
    assert one[22:38] != other[22:38] and one[38:50] != other[38:50] and one[58:] != other[58:]


def test_the_cost_of_a_guess_is_that_of_the_module() -> None:
    assert backup.COST.memory * backup.COST.passes >= 256 * 1024


def test_a_wrong_passphrase_and_every_changed_byte_are_refused() -> None:
    data = packed(KEYS[2:])
    with pytest.raises(PeerError, match="passphrase is wrong, or the file was changed"):
        taken(data, b"wrong")
    for at in (*range(22, 58), *range(58, len(data), 7), len(data) - 1):
        changed = bytearray(data)
        changed[at] ^= 1
        with pytest.raises(PeerError):
            taken(bytes(changed))


def test_every_truncation_and_any_appendix_is_refused() -> None:
    data = packed(KEYS[2:])
    for size in range(len(data)):
        with pytest.raises(PeerError, match=r"/b: (is no backup|ends after|has)"):
            taken(data[:size])
    with pytest.raises(PeerError, match="cut off, or damaged"):
        taken(data + b"\0")


@pytest.mark.parametrize(
    "cost",
    [Cost(0, 1, 1), Cost(8192, 0, 1), Cost(8192, 1, 0), Cost(1 << 31, 1, 1), Cost(1 << 20, 5, 1), Cost(8192, 17, 1)],
)
def test_a_cost_that_would_take_the_machine_is_refused_before_anything_is_derived(cost: Cost) -> None:
    data = packed()
    header = data[:16] + cost.memory.to_bytes(4, "big") + bytes((cost.passes, cost.lanes))
    with pytest.raises(PeerError, match="KiB of memory"):
        taken(header + data[22:])


def fields(**other: Any) -> dict[str, Any]:
    told = {"name": "work", "entry": text_of(ENTRY).decode(), "file": "AAAA", "suffix": ".pem", **other}
    return {key: value for key, value in told.items() if value is not None}


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"name": "../../x"}, "cannot be the name"),
        ({"name": ""}, "cannot be the name"),
        ({"name": "x.toml"}, "cannot be the name"),
        ({"name": 7}, "table of texts"),
        ({"entry": "module = 1"}, "must be a string"),
        ({"entry": "\udcff"}, "codec"),
        ({"entry": "#" * 20000}, "at most 16384"),
        ({"entry": None}, "are not those of a key"),
        ({"file": None}, "are not those of a key"),
        ({"suffix": None}, "are not those of a key"),
        ({"file": None, "suffix": None}, "names a key file that is not there"),
        ({"entry": text_of(ENTRY._replace(path=None)).decode()}, "or none, and one is there"),
        ({"file": "?"}, "not base64"),
        ({"file": ""}, "1 to 65536"),
        ({"file": "AAAA" * 30000}, "1 to 65536"),
        ({"passphrase": "AAAA" * 1000}, "1 to 1024"),
        ({"suffix": "/../../x"}, "cannot end in"),
        ({"suffix": ".toml"}, "cannot end in"),
        ({"link": "x"}, "are not those of a key"),
    ],
)
def test_a_hostile_key_is_refused(other: dict[str, Any], why: str) -> None:
    content = json.dumps({"keys": [fields(**other)]}).encode()
    with pytest.raises(PeerError, match=why):
        take_content(content, "/b")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"keys":[]}',
        b'{"keys":{}}',
        b'{"keys":[1]}',
        b'{"keys":[],"keys":[]}',
        b'{"keys":[],"more":1}',
        b'{"keys":' + b"[" * 100000,
        b"\xff",
        json.dumps({"keys": [fields(), fields()]}).encode(),
        json.dumps({"keys": [{}] * 1001}).encode(),
    ],
    ids=range(12),
)
def test_a_hostile_content_is_refused(content: bytes) -> None:
    with pytest.raises(PeerError):
        take_content(content, "/b")


def test_no_keys_and_too_many_are_not_packed() -> None:
    for keys in ([], KEYS * 500):
        with pytest.raises(UsageError, match="1 to 1000"):
            packed(keys)

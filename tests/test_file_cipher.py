"""Lower files that the kernel wrote are decrypted without it, and their file keys rewrapped."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA1
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from upcall.core.errors import PeerError
from upcall.protocols.ecryptfs.file_cipher import FileCipher, decrypted, stretch, unwrap_by_passphrase
from upcall.protocols.ecryptfs.header import (
    IN_XATTR,
    MAX_HEADER,
    Header,
    PassphrasePacket,
    PublicKeyPacket,
    replace_packets,
    take_header,
)
from upcall.protocols.ecryptfs.packets import FileKey, take_file_key

FOLDER = Path(__file__).parent / "vectors"
FILES: dict[str, dict[str, Any]] = json.loads((FOLDER / "lower_files.json").read_text())["files"]
KEYS: dict[str, Any] = json.loads((FOLDER / "keys.json").read_text())
SALT = bytes.fromhex("0011223344556677")
everywhere = pytest.mark.parametrize("name", FILES)


def rsa_key() -> rsa.RSAPrivateKey:
    key = load_pem_private_key(KEYS["keys"]["captured"]["pem"].encode(), KEYS["passphrase"].encode())
    assert isinstance(key, rsa.RSAPrivateKey)
    return key


def file_key(header: Header) -> FileKey:
    (packet,) = header.packets
    if isinstance(packet, PassphrasePacket):
        return unwrap_by_passphrase(packet, stretch(b"test", packet.salt))
    oaep = padding.OAEP(mgf=padding.MGF1(SHA1()), algorithm=SHA1(), label=None)
    return take_file_key(rsa_key().decrypt(packet.wrapped, oaep))


def lower(name: str) -> bytes:
    return zlib.decompress(base64.b64decode(FILES[name]["lower"]))


def header_of(name: str) -> bytes:
    attribute = bytes.fromhex(FILES[name].get("xattr", ""))
    return attribute or lower(name)[:MAX_HEADER]


def clear(data: bytes, header: Header, key: FileKey, folder: Path) -> bytes:
    path = folder / "lower"
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    try:
        at = 0 if header.flags & IN_XATTR else header.header_size
        return b"".join(decrypted(fd, at, header.size, FileCipher(key)))
    finally:
        os.close(fd)


@everywhere
def test_a_file_of_the_kernel_is_decrypted_to_what_was_written(name: str, tmp_path: Path) -> None:
    header = take_header(header_of(name))
    key = file_key(header)
    assert len(key.key) == int(name.rpartition("-")[2])
    data = clear(lower(name), header, key, tmp_path)
    assert (len(data), hashlib.sha256(data).hexdigest()) == (FILES[name]["size"], FILES[name]["sha256"])


@everywhere
def test_a_replaced_packet_leaves_all_other_bytes_of_a_header_of_the_kernel(name: str) -> None:
    data = header_of(name).ljust(MAX_HEADER, b"\0")
    new = PublicKeyPacket("00112233445566aa", b"w" * 384)
    change = replace_packets(data, [0], new)
    changed = data[: change.at] + change.new + data[change.at + len(change.new) :]
    assert take_header(changed) == take_header(data)._replace(packets=(new,))
    assert (changed[:26], changed[26 + 397 :].strip(b"\0")) == (data[:26], b"")


def test_files_of_all_kinds_were_captured() -> None:
    assert {name.rpartition("-")[0] for name in FILES} >= {"empty", "one", "extent", "hole", "xattr", "passphrase"}
    assert {name.rpartition("-")[2] for name in FILES} == {"16", "24", "32"}


def test_a_passphrase_is_stretched_as_by_ecryptfs_utils() -> None:
    key = stretch(b"test", SALT)
    assert key.signature == "d395309aaad4de06"
    assert key.key.hex().startswith("58116605277520b3fa1315497f208951")
    assert "5811" not in repr(key)


def test_another_passphrase_is_refused_by_its_signature() -> None:
    packet = take_header(header_of("passphrase-16")).packets[0]
    assert isinstance(packet, PassphrasePacket)
    with pytest.raises(PeerError, match="another passphrase wrapped it, with the signature d395309aaad4de06"):
        unwrap_by_passphrase(packet, stretch(b"wrong", SALT))


@pytest.mark.parametrize(("code", "name"), [(0x02, "des3_ede"), (0x04, "blowfish"), (0x0A, "twofish")])
def test_other_ciphers_are_refused_by_name(code: int, name: str) -> None:
    with pytest.raises(PeerError, match=f"the cipher {name}: only AES"):
        FileCipher(FileKey(code, bytes(16)))
    packet = PassphrasePacket("d395309aaad4de06", bytes(16), code, SALT, 0x60)
    with pytest.raises(PeerError, match=f"the cipher {name}: only AES"):
        unwrap_by_passphrase(packet, stretch(b"test", SALT))


@pytest.mark.parametrize("size", [8, 15, 17, 40, 64])
def test_a_wrapped_key_of_no_aes_size_is_refused(size: int) -> None:
    packet = PassphrasePacket("d395309aaad4de06", bytes(size), 0x07, SALT, 0x60)
    with pytest.raises(PeerError, match=f"a wrapped key of {size} bytes for AES"):
        unwrap_by_passphrase(packet, stretch(b"test", SALT))


def test_a_file_that_ends_early_gives_whole_extents_and_the_byte(tmp_path: Path) -> None:
    header = take_header(header_of("hole-16"))
    path = tmp_path / "lower"
    path.write_bytes(lower("hole-16")[: 8192 + 4096 + 7])
    fd = os.open(path, os.O_RDONLY)
    parts = decrypted(fd, 8192, header.size, FileCipher(file_key(header)))
    try:
        assert next(parts) == bytes(4096)
        with pytest.raises(PeerError, match="ends before the 9003 bytes") as caught:
            next(parts)
    finally:
        os.close(fd)
    assert caught.value.where == 8192 + 4096 + 7

"""Published values: Argon2id, HKDF and AES key wrap with padding, and the way from a passphrase to a wrapped key."""

from __future__ import annotations

import hmac
import os

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from upcall_passphrase import Handle
from upcall_passphrase.derived import Cost, check_cost, derive, stretch

from upcall.core.errors import ModuleFailed, UsageError

# --- Argon2id -----------------------------------------------------------------------------------------------


def test_argon2id_gives_the_value_of_rfc_9106() -> None:
    """RFC 9106, 5.3. It has a secret and associated data, which ours has not: the same class, asked directly."""
    kdf = Argon2id(
        salt=b"\x02" * 16, length=32, iterations=3, lanes=4, memory_cost=32, ad=b"\x04" * 12, secret=b"\x03" * 8
    )
    assert kdf.derive(b"\x01" * 32).hex() == "0d640df58d78766c08c037a34a8b53c9d01ef0452d75b65eb52520e96b01e659"


@pytest.mark.parametrize(
    ("word", "salt", "memory", "passes", "lanes", "tag"),
    [
        (b"password", b"somesalt", 1 << 16, 2, 1, "09316115d5cf24ed5a15a31a3ba326e5cf32edc24702987c02b6566f61913cf7"),
        (b"password", b"somesalt", 1 << 8, 2, 1, "9dfeb910e80bad0311fee20f9c0e2b12c17987b4cac90c2ef54d5b3021c68bfe"),
        (b"password", b"somesalt", 1 << 8, 2, 2, "6d093c501fd5999645e0ea3bf620d7b8be7fd2db59c20d9fff9539da2bf57037"),
        (b"password", b"somesalt", 1 << 16, 1, 1, "f6a5adc1ba723dddef9b5ac1d464e180fcd9dffc9d1cbf76cca2fed795d9ca98"),
        (b"password", b"somesalt", 1 << 16, 4, 1, "9025d48e68ef7395cca9079da4c4ec3affb3c8911fe4f86d1a2520856f63172c"),
        (
            b"differentpassword",
            b"somesalt",
            1 << 16,
            2,
            1,
            "0b84d652cf6b0c4beaef0dfe278ba6a80df6696281d7e0d2891b817d8c458fde",
        ),
        (b"password", b"diffsalt", 1 << 16, 2, 1, "bdf32b05ccc42eb15d58fd19b1f856b113da1e9a5874fdcc544308565aa8141c"),
    ],
)
def test_argon2id_gives_the_values_of_the_reference_implementation(
    word: bytes, salt: bytes, memory: int, passes: int, lanes: int, tag: str
) -> None:
    """From the test program of the reference implementation, version 1.3."""
    assert stretch(bytearray(word), salt, memory, passes, lanes, 32).hex() == tag


# --- HKDF ---------------------------------------------------------------------------------------------------


def test_hkdf_expand_gives_the_value_of_rfc_5869() -> None:
    """RFC 5869, A.1."""
    prk = bytes.fromhex("077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5")
    okm = HKDFExpand(SHA256(), 42, bytes.fromhex("f0f1f2f3f4f5f6f7f8f9")).derive(prk)
    assert okm.hex() == ("3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865")


def test_a_key_is_derived_as_the_readme_says() -> None:
    """As the README has it, with HMAC from elsewhere."""
    word, salt, cost = bytearray(b"correct horse"), bytes(range(16)), Cost(8, 1)
    derived = derive(word, salt, cost)
    root = Argon2id(salt=salt, length=32, iterations=1, lanes=4, memory_cost=8 * 1024).derive(b"correct horse")
    assert derived.kek == hmac.digest(root, b"upcall passphrase 1: key\x01", "sha256")
    assert derived.check == hmac.digest(root, b"upcall passphrase 1: check\x01", "sha256")[:16]
    assert word == b"correct horse"
    assert derive(word, salt, cost) == derived
    assert derived.kek.hex() not in repr(derived)


def test_passphrase_salt_and_cost_each_change_the_key() -> None:
    ways = [
        derive(bytearray(word), salt, cost)
        for word in (b"one", b"two")
        for salt in (bytes(16), bytes(15) + b"\1")
        for cost in (Cost(1, 1), Cost(1, 2), Cost(2, 1))
    ]
    assert len({bytes(way.kek) for way in ways}) == len({way.check for way in ways}) == len(ways)


@pytest.mark.parametrize("cost", [Cost(0, 1), Cost(1, 0), Cost(257, 1), Cost(256, 3), Cost(64, 9), Cost(-1, -1)])
def test_a_cost_out_of_bounds_is_refused(cost: Cost) -> None:
    with pytest.raises(UsageError, match="at most 256 MiB"):
        check_cost(cost)


# --- AES key wrap with padding ------------------------------------------------------------------------------

_KEK = "5840df6e29b02af1ab493b705bf16ea1ae8338f4dcc176a8"


@pytest.mark.parametrize(
    ("key", "wrapped"),
    [
        (
            "c37b7e6492584340bed12207808941155068f738",
            "138bdeaa9b8fa7fc61f97742e72248ee5ae6ae5360d1ae6a5f54f373fa543b6a",
        ),
        ("466f7250617369", "afbeb0f07dfbf5419200f2ccb50bb24f"),
    ],
)
def test_key_wrap_gives_the_values_of_rfc_5649(key: str, wrapped: str) -> None:
    """RFC 5649, 6."""
    handle = Handle(bytearray.fromhex(_KEK))
    assert handle.wrap(bytes.fromhex(key)).hex() == wrapped
    assert handle.unwrap(bytes.fromhex(wrapped)).hex() == key


def key_wrap(kek: bytes, initial: bytes, blocks: list[bytes]) -> bytes:
    """RFC 3394, 2.2.1, as it stands there."""
    aes = Cipher(algorithms.AES(kek), modes.ECB()).encryptor()
    a, r = initial, list(blocks)
    for j in range(6):
        for i in range(len(r)):
            b = aes.update(a + r[i])
            a = (int.from_bytes(b[:8], "big") ^ (len(r) * j + i + 1)).to_bytes(8, "big")
            r[i] = b[8:]
    return a + b"".join(r)


@pytest.mark.parametrize(
    ("kek", "key", "wrapped"),
    [
        (16, 16, "1fa68b0a8112b447aef34bd8fb5a7b829d3e862371d2cfe5"),
        (32, 16, "64e8c3f9ce0f5ba263e9777905818a2a93c8191e7d6e8ae7"),
        (32, 32, "28c9f404c4b810f4cbccb35cfb87f8263f5786e2d80ed326cbc7f0e71a99f43bfb988b9b7a02dd21"),
    ],
)
def test_the_tests_own_key_wrap_gives_the_values_of_rfc_3394(kek: int, key: int, wrapped: str) -> None:
    """RFC 3394, 4.1, 4.3 and 4.6."""
    data = bytes.fromhex("00112233445566778899aabbccddeeff000102030405060708090a0b0c0d0e0f")[:key]
    blocks = [data[at : at + 8] for at in range(0, key, 8)]
    assert key_wrap(bytes(range(kek)), b"\xa6" * 8, blocks).hex() == wrapped


@pytest.mark.parametrize("size", range(1, 68))
def test_every_size_is_wrapped_as_by_the_tests_own_key_wrap(size: int) -> None:
    """RFC 5649, 4.1: padded with zeros; a single block is encrypted once."""
    kek, clear = os.urandom(32), os.urandom(size)
    padded = clear + bytes(-size % 8)
    initial = b"\xa6\x59\x59\xa6" + size.to_bytes(4, "big")
    if len(padded) == 8:
        expected = Cipher(algorithms.AES(kek), modes.ECB()).encryptor().update(initial + padded)
    else:
        expected = key_wrap(kek, initial, [padded[at : at + 8] for at in range(0, len(padded), 8)])
    handle = Handle(bytearray(kek))
    assert handle.wrap(clear) == expected
    assert handle.unwrap(expected) == clear


@pytest.mark.parametrize("size", [68, 72])
def test_a_well_wrapped_key_that_is_too_long_is_refused(size: int) -> None:
    kek, clear = os.urandom(32), os.urandom(size)
    padded = clear + bytes(-size % 8)
    blocks = [padded[at : at + 8] for at in range(0, len(padded), 8)]
    wrapped = key_wrap(kek, b"\xa6\x59\x59\xa6" + size.to_bytes(4, "big"), blocks)
    with pytest.raises(ModuleFailed, match=f"these {len(wrapped)} bytes"):
        Handle(bytearray(kek)).unwrap(wrapped)

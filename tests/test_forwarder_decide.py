"""What the forwarder does with an answer: byte tables, and mutants, in C (with sanitizers) and in Python alike."""

from __future__ import annotations

import errno
import json
import random
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.forwarder.scene import DNS, KEY, SPNEGO, answered, decider, refused, server, servers, spnego
from upcall.core.errors import PeerError
from upcall.protocols.request_key.forwarder.standin import decide

HEAD = 32  # bytes before the payload
Case = tuple[bytes, bytes]  # described, message


def decided_in_python(case: Case) -> tuple[int, int, bytes]:
    return decide(case[0], KEY, case[1])


def decided_in_c(cases: Sequence[Case]) -> list[tuple[int, int, bytes]]:
    program = decider()
    if program is None:
        pytest.skip("there is no C compiler")
    told = b"".join(struct.pack("=III", len(one), KEY, len(two)) + one + two for one, two in cases)
    ran = subprocess.run([program], input=told, capture_output=True, timeout=120)
    assert (ran.returncode, ran.stderr) == (0, b"")
    found = []
    for (_, message), line in zip(cases, ran.stdout.splitlines(), strict=True):
        refusal, expiry, at, size = map(int, line.split())
        found.append((refusal, expiry, message[at : at + size]))
    return found


def verdict(described: bytes, payload: bytes) -> bool:
    """True if both accept the payload, False if both refuse it as nonsense."""
    case = described, answered(payload, 7)
    found = decided_in_python(case)
    if decider() is not None:
        assert decided_in_c([case]) == [found]
    assert found in ((0, 7, payload), (errno.EPROTO, 0, b""))
    return found[0] == 0


def spnego_head(version: int, flags: int, key: int, blob: int, rest: int) -> bytes:
    return struct.pack("<IIII", version, flags, key, blob) + bytes(rest)


@pytest.mark.parametrize(("key", "blob"), [(16, 16), (16, 4000), (64, 16), (33, 32767 - 49)])
def test_spnego(key: int, blob: int) -> None:
    assert verdict(SPNEGO, spnego(key, blob))


@pytest.mark.parametrize(
    "payload",
    [
        spnego()[:1], spnego()[:15], spnego()[:16], spnego()[:-1], spnego() + b"\0", spnego() + bytes(4),
        spnego_head(1, 0, 16, 16, 32), spnego_head(2, 1, 16, 16, 32), spnego_head(0x02000000, 0, 16, 16, 32),
        spnego_head(2, 0, 0, 32, 32), spnego_head(2, 0, 15, 17, 32), spnego_head(2, 0, 65, 16, 81),
        spnego_head(2, 0, 16, 15, 31), spnego_head(2, 0, 16, 0, 16), spnego_head(2, 0, 16, 0xFFFFFFF0, 0),
        spnego_head(2, 0, 16, 0xFFFFFFFF, 15), spnego_head(2, 0, 0xFFFFFFF0, 16, 0), spnego_head(2, 0, 32, 16, 32),
        spnego_head(2, 0, 64, 0x80000000, 100), spnego_head(2, 0, 0x80000010, 16, 32),
        struct.pack(">IIII", 2, 0, 16, 16) + bytes(32),
    ],
    ids=range(21),
)  # fmt: skip
def test_bad_spnego(payload: bytes) -> None:
    assert not verdict(SPNEGO, payload)


@pytest.mark.parametrize(
    "text", [b"x", b"192.0.2.1", b"192.0.2.1,2001:db8::1", b"#dnserror=1", b"a,b#dnserror=511", b"x" * 4095]
)
def test_dns_text(text: bytes) -> None:
    assert verdict(DNS, text + b"\0")


@pytest.mark.parametrize(
    "payload",
    [
        b"192.0.2.1", b"192.0.2.1\n\0", b"192.0.2.1 \0", b"192.0.2.1\0\0", b"a\0b\0", b"\x7f\0", b"\x80\0", b",\0",
        b"a,\0", b",a\0", b"a,,b\0", b"a,#dnserror=3\0", b"#\0", b"a#\0", b"##\0", b"#dnserror=3#dnserror=3\0",
        b"#dnserror=0\0", b"#dnserror=512\0", b"#dnserror=\0", b"#dnserror\0", b"#dnserror=03\0", b"#dnserror=+3\0",
        b"#dnserror=1000\0", b"#dnserror=3 \0", b"#dnserror=-1\0", b"#other=3\0", b"#dnserror=3", b"a#dnserror=3#\0",
        b"x" * 4096 + b"\0", b"\0",
    ],
)  # fmt: skip
def test_bad_dns_text(payload: bytes) -> None:
    assert not verdict(DNS, payload)


@pytest.mark.parametrize(
    "payload",
    [
        servers(), servers(server()), servers(server(), server(b"x", [])), servers(server(b"n" * 255)),
        servers(server(addresses=[bytes(4)] * 255)), servers(*[server()] * 255),
    ],
    ids=range(6),
)  # fmt: skip
def test_dns_servers(payload: bytes) -> None:
    assert verdict(DNS, payload)
    for cut in range(max(0, len(payload) - 60), len(payload)):
        assert decided_in_python((DNS, answered(payload[:cut])))[0] == errno.EPROTO
    cases = [(DNS, answered(payload[:cut])) for cut in range(1, len(payload), 1 + len(payload) // 200)]
    assert {found[0] for found in decided_in_c(cases)} == {errno.EPROTO}


def changed(payload: bytes, at: int, value: int) -> bytes:
    return payload[:at] + bytes([value]) + payload[at + 1 :]


ONE = servers(server())


@pytest.mark.parametrize(
    "payload",
    [
        ONE + b"\0", servers(server(), count=2), servers(server(), server(), count=1), servers(count=1),
        changed(ONE, 1, 1), changed(ONE, 2, 0), changed(ONE, 2, 2), changed(ONE, 3, 6), changed(ONE, 4, 8),
        changed(ONE, 14, 6), changed(ONE, 15, 8), changed(ONE, 16, 3), changed(ONE, 17, 1), changed(ONE, 17, 3),
        changed(ONE, 31, 2), changed(ONE, 18, 0), changed(ONE, 18, 32), changed(ONE, 7, 1), servers(server(b"")),
        servers(server(b"n" * 256)), b"\0", b"\0\0", b"\0\0\1", b"\0\0\1\0\0",
    ],
    ids=range(24),
)  # fmt: skip
def test_bad_dns_servers(payload: bytes) -> None:
    assert not verdict(DNS, payload)


# --- mutants -------------------------------------------------------------------------------------------------

SEEDS = [
    (SPNEGO, spnego()), (SPNEGO, spnego(64, 80)),
    (DNS, b"192.0.2.1,2001:db8::1#dnserror=3\0"), (DNS, b"#dnserror=42\0"), (DNS, ONE),
    (DNS, servers(server(b"ab", [bytes(4)]), server(b"c", []))),
]  # fmt: skip
TYPES = [SPNEGO, DNS, b"user;", b"", b"cifs.spnego", b"dns_resolver;"]
VALUES = [0, 1, 2, 15, 16, 17, 64, 65, 127, 255, 256, 0x7FFFFFFF, 0x80000000, 0xFFFFFFF0, 0xFFFFFFFF]
BYTES = [0, 1, 2, 35, 44, 48, 57, 127, 255]


def mutant(chance: random.Random, data: bytes) -> bytes:
    made = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at = chance.randrange(len(made) + 1)
        match chance.randrange(6):
            case 0:
                made[at : at + 1] = bytes([chance.choice(BYTES)])
            case 1:
                made[at : at + 4] = struct.pack("=I", chance.choice(VALUES))
            case 2:
                del made[at : at + chance.choice((1, 2, 4, 16))]
            case 3:
                made[at:at] = chance.randbytes(chance.choice((1, 2, 4, 16)))
            case 4:
                made[at:at] = made[at : at + chance.choice((1, 4, 17))]
            case _ if made:
                made[at % len(made)] ^= 1 << chance.randrange(8)
    return bytes(made)


def mutants(seed: int, count: int) -> list[Case]:
    """Half of them in a sound message, so that the payload's own check is reached."""
    chance = random.Random(seed)
    cases: list[Case] = []
    for _ in range(count):
        described, payload = chance.choice(SEEDS)
        if chance.random() < 0.05:
            described = chance.choice(TYPES)
        if chance.random() < 0.5:
            cases.append((described, answered(mutant(chance, payload)[:32767] or b"x", chance.choice(VALUES))))
        else:
            message = answered(payload) if chance.random() < 0.7 else refused(chance.choice((0, 2, 126, 512, 4095)))
            cases.append((described, mutant(chance, message)))
    return cases


def compare(cases: Sequence[Case]) -> None:
    expected = [decided_in_python(case) for case in cases]
    assert {found[0] for found in expected} >= {0, errno.EPROTO, errno.EKEYREJECTED}
    for case, python, c in zip(cases, expected, decided_in_c(cases), strict=True):
        assert python == c, case


def test_c_and_python_decide_alike() -> None:
    compare(mutants(1, 3000))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 8))
def test_c_and_python_decide_alike_on_many_mutants(seed: int) -> None:
    compare(mutants(seed, 30_000))


@pytest.mark.parametrize("good", [True, False])
def test_the_table_of_dns_payloads(good: bool) -> None:
    """tests/test_wire_dns_resolver.py reads it, too."""
    rows = json.loads((Path(__file__).parent / "vectors" / "dns_resolver.json").read_text())
    payloads = [bytes.fromhex(row["payload"]) for row in rows["good" if good else "bad"]]
    assert [payload.hex() for payload in payloads if payload and verdict(DNS, payload) != good] == []


@pytest.mark.parametrize(("described", "codec"), [(SPNEGO, "cifs_spnego"), (DNS, "dns_resolver")])
def test_the_broker_judges_payloads_alike(described: bytes, codec: str) -> None:
    check_payload = pytest.importorskip(f"upcall.wire.{codec}").check_payload
    chance = random.Random(9)
    seeds = [payload for kind, payload in SEEDS if kind == described]
    for _ in range(5000):
        payload = mutant(chance, chance.choice(seeds))[:32767] or b"x"
        try:
            check_payload(payload)
        except PeerError:
            assert decided_in_python((described, answered(payload)))[0] == errno.EPROTO, payload
        else:
            assert decided_in_python((described, answered(payload))) == (0, 0, payload)

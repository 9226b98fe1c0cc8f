"""What the forwarder does with an answer: byte tables, and mutants, in C (with sanitizers) and in Python alike."""

from __future__ import annotations

import errno
import random
import struct
import subprocess
from collections.abc import Sequence

import pytest

from tests.forwarder.scene import DNS, KEY, SPNEGO, answered, decider, refused, spnego
from upcall.core.errors import PeerError
from upcall.protocols.request_key import cifs_spnego
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
    """True if both accept the payload, False if both refuse it with EPROTO."""
    case = described, answered(payload, 7)
    found = decided_in_python(case)
    if decider() is not None:
        assert decided_in_c([case]) == [found]
    assert found in ((0, 7, payload), (errno.EPROTO, 0, b""))
    return found[0] == 0


def spnego_head(version: int, flags: int, key: int, blob: int, rest: int) -> bytes:
    return struct.pack("<IIII", version, flags, key, blob) + bytes(rest)


@pytest.mark.parametrize(("key", "blob"), [(16, 16), (16, 4000), (64, 16), (33, 32767 - 49)])
def test_a_sound_spnego_payload_is_accepted(key: int, blob: int) -> None:
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
def test_a_malformed_spnego_payload_is_refused(payload: bytes) -> None:
    assert not verdict(SPNEGO, payload)


@pytest.mark.parametrize("described", [b"id_new;0;0;39010000;x", DNS, b"cifs.spneg;", b"cifs.spnego", b""])
@pytest.mark.parametrize("payload", [b"\0", b"#dnserror=0", spnego()[:15], bytes(32767)], ids=range(4))
def test_a_payload_of_a_type_without_a_rule_is_accepted(described: bytes, payload: bytes) -> None:
    assert verdict(described, payload)


# --- mutants -------------------------------------------------------------------------------------------------

SEEDS = [
    (SPNEGO, spnego()), (SPNEGO, spnego(64, 80)),
    (DNS, b"192.0.2.1,2001:db8::1#dnserror=3\0"), (b"id_new;", b"1000\0"),
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
    assert {found[0] for found in expected} >= {0, errno.EPROTO}
    for case, python, c in zip(cases, expected, decided_in_c(cases), strict=True):
        assert python == c, case


def test_c_and_python_decide_alike() -> None:
    compare(mutants(1, 3000))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 8))
def test_c_and_python_decide_alike_on_many_mutants(seed: int) -> None:
    compare(mutants(seed, 30_000))


def test_the_broker_judges_payloads_of_cifs_spnego_alike() -> None:
    """The broker has the whole rule; decide.c repeats it, because a malformed payload would harm the kernel."""
    chance = random.Random(9)
    seeds = [payload for described, payload in SEEDS if described == SPNEGO]
    seen = set()
    for _ in range(5000):
        payload = mutant(chance, chance.choice(seeds))[:32767] or b"x"
        try:
            cifs_spnego.check_payload(payload)
        except PeerError:
            assert decided_in_python((SPNEGO, answered(payload)))[0] == errno.EPROTO, payload
            seen.add(False)
        else:
            assert decided_in_python((SPNEGO, answered(payload))) == (0, 0, payload)
            seen.add(True)
    assert seen == {True, False}

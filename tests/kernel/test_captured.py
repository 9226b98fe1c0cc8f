"""Files whose keys the C daemon (ecryptfsd of ecryptfs-utils 111) wrapped, read through ours."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from tests.kernel.scene import VECTORS, answered, attempt, enrol, key_service, keys, nothing_given_up, opening, vault
from upcall.protocols.ecryptfs import packets as wire
from upcall.protocols.ecryptfs.key_handler import KeyHandler
from upcall.testing.lab.stage import Person, do_as, fork_broker, fork_daemon

CAPTURED = keys()["captured"]
PAGE, HEADER = 4096, 8192


class _Captured(NamedTuple):
    """A file key, and its wrapped form as the daemon of that name gave it to the kernel."""

    daemon: str
    key: bytes
    wrapped: bytes


def _captured() -> list[_Captured]:
    vectors = json.loads((VECTORS / "ecryptfs.json").read_text())
    asked: dict[int, wire.Ask] = {}
    found = []
    for exchange in vectors["exchanges"]:
        frame = wire.take_frame(bytes.fromhex(exchange["hex"]))
        if not frame.data:
            continue
        if frame.type == wire.REQUEST:
            asked[frame.seq] = wire.take_ask(frame.data)
        elif frame.seq in asked and asked[frame.seq].tag == wire.TAG_66:
            reply = wire.take_reply(frame.data)
            if reply.status == wire.STATUS_OK:
                key = wire.take_file_key(asked[frame.seq].content).key
                found.append(_Captured(exchange["daemon"], key, reply.content))
    return found


@pytest.fixture(scope="module", autouse=True)
def _people(alice: Person) -> Iterator[None]:
    enrol(alice, CAPTURED)
    broker = fork_broker()
    daemon = fork_daemon(alice, _with_its_key_open)
    yield
    daemon.end()
    broker.end()


def _with_its_key_open() -> KeyHandler:
    """As `upcall daemon` does before it registers: the first opening of a key can take an emulated processor longer
    than the kernel waits."""
    handler = key_service()
    handler.warm([CAPTURED.signature], ahead=True)
    return handler


def _lower_file(captured: _Captured, content: bytes) -> bytes:
    """As the kernel writes it: the captured header with this wrapped key, and one page (fs/ecryptfs/crypto.c)."""
    header = bytes.fromhex(json.loads((VECTORS / "ecryptfs.json").read_text())["lower_header"]["root_upstream_f0"])
    at = header.index(bytes.fromhex(CAPTURED.signature)) + 9
    whole = len(content).to_bytes(8, "big") + header[8:at] + captured.wrapped
    root_iv = hashlib.md5(captured.key).digest()
    iv = hashlib.md5(root_iv + b"0".ljust(16, b"\0")).digest()
    encryptor = Cipher(algorithms.AES(captured.key), modes.CBC(iv)).encryptor()
    return whole.ljust(HEADER, b"\0") + encryptor.update(content.ljust(PAGE, b"\0")) + encryptor.finalize()


def test_the_captures_hold_keys_of_both_daemons() -> None:
    assert {each.daemon for each in _captured()} == {"upstream", "python"}


@pytest.mark.parametrize("number", range(len(_captured())))
def test_a_file_whose_key_ecryptfsd_wrapped_is_read(alice: Person, number: int) -> None:
    captured = _captured()[number]
    content = f"a file whose key {captured.daemon} wrapped, number {number}\n".encode()
    with vault(alice, CAPTURED.signature) as files:
        lower = files.lower / "captured"
        do_as(alice, lambda: lower.write_bytes(_lower_file(captured, content)))
        assert answered(alice, opening(files.upper / "captured")).value == content


def test_a_header_that_ecryptfsd_wrote_is_accepted(alice: Person) -> None:
    """Byte for byte what lay on the disk after ecryptfsd; its page was not captured, so only the opening counts."""
    vectors = json.loads((VECTORS / "ecryptfs.json").read_text())["lower_header"]
    with vault(alice, CAPTURED.signature) as files:
        for name, header in vectors.items():
            whole = bytes.fromhex(header).ljust(HEADER, b"\0") + bytes(PAGE)
            do_as(alice, lambda name=name, whole=whole: (files.lower / name).write_bytes(whole))  # type: ignore[misc]
            assert len(answered(alice, opening(files.upper / name)).value) == 100  # type: ignore[arg-type]


def test_a_damaged_wrapped_key_is_refused_at_once(alice: Person) -> None:
    captured = _captured()[0]
    damaged = captured._replace(wrapped=bytes([captured.wrapped[0] ^ 1]) + captured.wrapped[1:])
    with vault(alice, CAPTURED.signature) as files:
        do_as(alice, lambda: Path(files.lower / "damaged").write_bytes(_lower_file(damaged, b"x")))
        with nothing_given_up():
            assert attempt(alice, opening(files.upper / "damaged")).errno == errno.EIO

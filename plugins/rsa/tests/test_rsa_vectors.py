"""What ecryptfs-utils and the kernel said to each other, answered by this module."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.hashes import SHA1, Hash
from upcall_rsa import Handle, module
from upcall_rsa.blob import Blob, pack_blob, take_blob

from upcall.protocols.ecryptfs import packets as wire
from upcall.protocols.ecryptfs.authtok import take_auth_tok
from upcall.protocols.ecryptfs.header import take_header
from upcall.testing.secrets import GivenSecrets

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[3] / "tests" / "vectors" / "ecryptfs.json").read_text())
KEY = VECTORS["keys"]["root"]


def pairs(tag: int) -> list[tuple[wire.Ask, wire.Reply]]:
    """Each captured request with this tag and its reply, where the module was able to give one."""
    asked: dict[tuple[int, int | None], wire.Ask] = {}
    found = []
    for exchange in VECTORS["exchanges"]:
        frame = wire.take_frame(bytes.fromhex(exchange["hex"]))
        if frame.data is None:
            continue
        if frame.type == wire.REQUEST:
            asked[frame.seq, frame.index] = wire.take_ask(frame.data)
            continue
        reply = wire.take_reply(frame.data)
        ask = asked.pop((frame.seq, frame.index))
        if ask.tag == tag and reply.status == wire.STATUS_OK:
            found.append((ask, reply))
    return found


@pytest.fixture(scope="module")
def handle(tmp_path_factory: pytest.TempPathFactory) -> Handle:
    path = tmp_path_factory.mktemp("key") / "key.pem"
    path.touch(0o600)
    path.write_text(KEY["pem"])
    blob = pack_blob(Blob(str(path), None, KEY["passphrase"].encode()))
    return module.open(KEY["sig"], blob, GivenSecrets())


def test_the_vectors_are_there() -> None:
    assert len(pairs(wire.TAG_64)) >= 8
    assert len(pairs(wire.TAG_66)) >= 8


@pytest.mark.parametrize(("ask", "reply"), pairs(wire.TAG_64))
def test_captured_decrypt_requests_get_the_captured_reply(handle: Handle, ask: wire.Ask, reply: wire.Reply) -> None:
    assert ask.signature == KEY["sig"]
    assert handle.unwrap(ask.content) == reply.content


@pytest.mark.parametrize(("ask", "reply"), pairs(wire.TAG_66))
def test_captured_encrypt_requests_are_wrapped_and_unwrap_again(
    handle: Handle, ask: wire.Ask, reply: wire.Reply
) -> None:
    """OAEP is random: what was wrapped then must unwrap to what was asked, and so must what we wrap."""
    assert handle.unwrap(reply.content) == ask.content
    wrapped = handle.wrap(ask.content)
    assert len(wrapped) == len(reply.content)
    assert handle.unwrap(wrapped) == ask.content


@pytest.mark.parametrize("name", VECTORS["lower_header"])
def test_wrapped_keys_of_captured_headers_unwrap_to_file_keys(handle: Handle, name: str) -> None:
    (packet,) = take_header(bytes.fromhex(VECTORS["lower_header"][name])).packets
    assert packet.signature == KEY["sig"]
    wire.take_file_key(handle.unwrap(packet.wrapped))


def test_the_captured_signature_is_the_hash_of_its_preimage() -> None:
    digest = Hash(SHA1())
    digest.update(bytes.fromhex(KEY["sig_preimage_hex"]))
    assert digest.finalize()[:8].hex() == KEY["sig"]


def test_the_captured_blob_is_read_and_written_the_same() -> None:
    told = VECTORS["auth_tok"]
    token = take_auth_tok(bytes.fromhex(told["hex"]))
    assert token.alias == module.name
    assert take_blob(token.blob) == Blob(told["path"], None, told["passphrase"].encode())
    assert pack_blob(take_blob(token.blob)) == token.blob

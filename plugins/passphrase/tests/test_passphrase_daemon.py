"""A real broker and a real daemon with keys that are made of a passphrase, asked over real sockets."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from upcall_passphrase import module

from upcall.core.errors import Refused
from upcall.keymodule import Enrolled, Limits, Making
from upcall.testing.keys import FolderKeyring
from upcall.testing.processes import RunningBroker, RunningDaemon
from upcall.testing.secrets import GivenSecrets

WORD = b"correct horse"


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short name: the path of a socket has 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="upcall-") as name:
        yield Path(name)


@pytest.fixture
def made(folder: Path) -> Enrolled:
    """A key in the daemon's keyring; its passphrase is in a file."""
    word = folder / "word"
    word.touch(0o600)
    word.write_bytes(WORD)
    making = Making(
        folder / "key", {"memory": "64", "passes": "1"}, bytearray(WORD), f"file:{word}", Limits(), GivenSecrets()
    )
    found = module.generate(making)
    FolderKeyring(folder / "keys").add(found.signature, module.name, found.blob)
    return found


@pytest.fixture
def broker(folder: Path, made: Enrolled) -> Iterator[RunningBroker]:
    """With a daemon that found its way to it."""
    with RunningBroker(folder / "broker") as running:
        spec = {module.name: "upcall_passphrase:module"}
        with RunningDaemon(running.folder, folder / "keys", spec) as daemon:
            running.registered(daemon.pid)
            yield running


def test_there_and_back(broker: RunningBroker, made: Enrolled) -> None:
    with broker.client() as client:
        for size in (1, 16, 32, 64):
            clear = os.urandom(size)
            assert client.unwrap(made.signature, client.wrap(made.signature, clear)) == clear
        with pytest.raises(Refused, match="module-failed"):
            client.unwrap(made.signature, bytes(80))


def test_a_wrong_passphrase_and_then_the_right_one(broker: RunningBroker, made: Enrolled, folder: Path) -> None:
    (folder / "word").write_bytes(b"battery staple")
    with broker.client() as client:
        with pytest.raises(Refused, match="module-failed"):
            client.wrap(made.signature, b"clear")
        (folder / "word").write_bytes(WORD)
        assert client.unwrap(made.signature, client.wrap(made.signature, b"clear")) == b"clear"
    assert "battery" not in (folder / "daemon.log").read_text()

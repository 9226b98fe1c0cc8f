"""Tests a key module in a real daemon with a real broker, over real sockets, as a pytest class to inherit:

class TestMyModuleInADaemon(KeyDaemonContract):
    module = module
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import pytest

from upcall.core.errors import Refused
from upcall.keymodule import Enrolled, KeyMaker, KeyModule, Limits, Making
from upcall.keys import plugins
from upcall.keys.enrolment import chosen
from upcall.testing.keys import FolderKeyring
from upcall.testing.processes import RunningBroker, RunningDaemon
from upcall.testing.secrets import GivenSecrets

WORD = b"correct horse"


class MakingModule(KeyModule, KeyMaker, Protocol):
    """A module that makes keys."""


class KeyDaemonContract:
    """Tests for an installed module whose keys have passphrases."""

    module: MakingModule
    values: Mapping[str, str] = {}  # of parameters without a default, by name

    @pytest.fixture
    def folder(self) -> Iterator[Path]:
        """A folder with a short name: the path of a socket has at most 107 bytes."""
        with tempfile.TemporaryDirectory(prefix="upcall-") as name:
            yield Path(name)

    @pytest.fixture
    def made(self, folder: Path) -> Enrolled:
        """A new key in the daemon's keyring, whose passphrase is in a file."""
        word = folder / "word"
        word.touch(0o600)
        word.write_bytes(WORD)
        values = chosen(self.module.parameters, self.values)
        making = Making(folder / "key", values, bytearray(WORD), f"file:{word}", Limits(), GivenSecrets())
        found = self.module.generate(making)
        FolderKeyring(folder / "keys").add(found.signature, self.module.name, found.blob)
        return found

    @pytest.fixture
    def broker(self, folder: Path, made: Enrolled) -> Iterator[RunningBroker]:
        """A broker with a registered daemon."""
        with RunningBroker(folder / "broker") as running:
            spec = {self.module.name: plugins.available()[self.module.name].spec}
            with RunningDaemon(running.folder, folder / "keys", spec) as daemon:
                running.registered(daemon.pid)
                yield running

    def test_keys_of_every_size_come_back(self, broker: RunningBroker, made: Enrolled) -> None:
        with broker.client() as client:
            for size in (1, 16, 32, 64):
                clear = os.urandom(size)
                assert client.unwrap(made.signature, client.wrap(made.signature, clear)) == clear
            with pytest.raises(Refused, match="module-failed"):
                client.unwrap(made.signature, bytes(80))

    def test_a_wrong_passphrase_and_then_the_right_one(
        self, broker: RunningBroker, made: Enrolled, folder: Path
    ) -> None:
        (folder / "word").write_bytes(b"battery staple")
        with broker.client() as client:
            with pytest.raises(Refused, match="module-failed"):
                client.wrap(made.signature, b"clear")
            (folder / "word").write_bytes(WORD)
            assert client.unwrap(made.signature, client.wrap(made.signature, b"clear")) == b"clear"
        assert "battery" not in (folder / "daemon.log").read_text()

"""Root's broker and people's daemons as they are started without systemd, on an older kernel: what they cannot do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import escaping
from tests.kernel.scene import CONTENT, attempt, keys, opening, vault
from upcall.client import Client
from upcall.daemon.plugins import Module, Plugins
from upcall.daemon.settings import DaemonSettings
from upcall.kernel import capabilities, keyring, landlock
from upcall.process.settings import dumps
from upcall.protocols.ecryptfs.authtok import AuthTok, pack_auth_tok
from upcall.testing.lab.stage import (
    PATIENCE,
    Person,
    broker_status,
    do_as,
    end,
    serving,
    start_broker,
    start_daemon,
    wait_until,
)

ABI = landlock.abi()
KEY = b"0123456789abcdef"


@pytest.fixture(scope="module", autouse=True)
def broker() -> Iterator[int]:
    process = start_broker()
    try:
        yield process.pid
    finally:
        end(process)


def _status(pid: int) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)


def test_the_broker_has_what_it_needs_and_no_more(broker: int, alice: Person) -> None:
    """docs/operations.md says what for. It opens the device in alice's name with that."""
    said = (broker_status() or {})["broker"]["hardening"]
    assert said == {"seccomp": "yes", "landlock": str(ABI), "capabilities": "SETUID"}
    found = _status(broker)
    kept = sum(1 << capabilities.NAMES.index(name) for name in ("SETUID",))
    assert {int(found[name], 16) for name in ("CapEff", "CapPrm", "CapBnd")} == {kept}
    assert (found["NoNewPrivs"], found["Seccomp"], int(found["CapAmb"], 16)) == ("1", "2", 0)
    daemon = start_daemon(alice)

    def looked_into() -> set[str]:
        traced = escaping.outcome(lambda: escaping._by_name("ptrace", 0x4206, daemon.pid, 0, 0))
        return {traced, escaping.outcome(lambda: os.open(f"/proc/{daemon.pid}/mem", os.O_RDONLY))}

    try:
        assert do_as(alice, looked_into) <= {"EPERM", "EACCES"}
        with vault(alice, keys()["rsa2048"].signature) as made:
            (path,) = made.cold(1)
            assert attempt(alice, opening(path)).value == CONTENT
    finally:
        end(daemon)


@pytest.mark.parametrize("name", ["alice", "root"])
def test_a_key_module_cannot_reach_beyond_its_sandbox(broker: int, name: str, request: pytest.FixtureRequest) -> None:
    """In alice's daemon, and in root's, which has given up what root could; the process that it reaches for is the
    broker. The kernel's version of Landlock decides about what `since` has."""
    who: Person = request.getfixturevalue(name)
    home, signature = who.home / "escape", os.urandom(8).hex()
    report = Path(f"/tmp/escaping.{name}")

    def prepare() -> None:
        (home / ".ssh").mkdir(parents=True)
        for file in (escaping.KEYS, Path(".bashrc")):
            (home / file).write_text("before")
        told = {"home": str(home), "pid": broker, "port": 0, "report": str(report)}
        token = AuthTok(signature, "escaping", json.dumps(told).encode())
        keyring.add_user_key(signature, pack_auth_tok(token))

    do_as(who, prepare)
    daemon = _daemon(who)
    try:
        wait_until(lambda: serving(who.uid) == daemon.pid, f"the daemon of {name}", 2 * PATIENCE)

        def ask() -> bool:
            with Client(timeout=60) as client:
                return client.unwrap(signature, client.wrap(signature, KEY)) == KEY

        assert do_as(who, ask)
        found: dict[str, Any] = json.loads(report.read_text())
    finally:
        end(daemon)
    assert not {one: said for one, said in found["forbidden"].items() if said not in ("EPERM", "EACCES")}
    found["works"].pop("connect")  # the guest has no network
    assert set(found["works"].values()) == {"done"}, found["works"]
    assert {int(found["status"][one], 16) for one in ("CapEff", "CapPrm", "CapAmb")} == {0}
    assert (found["status"]["Seccomp"], found["core"], found["dumpable"]) == ("2", [0, 0], 0)
    assert sorted(one.name for one in home.iterdir()) == [".bashrc", ".ssh"]
    assert (home / escaping.KEYS).read_text() == ("before" if ABI >= 3 else "")


def _daemon(who: Person) -> subprocess.Popen[bytes]:
    """`upcall daemon`, with a key module that nobody has installed."""
    plugins = Plugins((Module("escaping", "tests.escaping:MODULE"),))
    words = [sys.executable, "-P", "-m", "upcall.daemon", dumps(DaemonSettings(plugins=plugins))]
    surroundings = {**who.environment(), "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(words, user=who.uid, group=who.gid, extra_groups=[], env=surroundings, cwd="/")

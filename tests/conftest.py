"""Configures all tests, and provides fixtures that start a broker and daemons in folders of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.escaping import KEYS
from upcall.testing.gate import Gate
from upcall.testing.keys import FolderKeyring
from upcall.testing.processes import ONLY_AGENT, RunningBroker, RunningDaemon, StartDaemon
from upcall.testing.toy import make_toy_key

settings.register_profile(
    "upcall", max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("upcall")

MODULES = {"toy": "upcall.testing.toy:TOY", "bad": "misbehaving:BAD", "asking": "selfasking:ASKING"}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder for a broker, with a short name, which other users can reach."""
    above = Path(tempfile.mkdtemp(prefix="upcall-"))
    above.chmod(0o755)
    yield above / "broker"
    shutil.rmtree(above)


@pytest.fixture
def runtime_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runtime folder of this user, for the test and its processes."""
    run = folder.parent / "run"
    run.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(run))
    return run


@pytest.fixture
def broker(folder: Path) -> Iterator[RunningBroker]:
    with RunningBroker(folder) as running:
        yield running


@pytest.fixture
def keyring(folder: Path) -> FolderKeyring:
    return FolderKeyring(folder.parent / "keys")


@pytest.fixture
def signature(folder: Path, keyring: FolderKeyring) -> str:
    """The signature of a working toy key."""
    name, blob = make_toy_key(folder.parent / "toy.key")
    return keyring.add(name, "toy", blob)


@pytest.fixture
def start_daemon(folder: Path, keyring: FolderKeyring) -> Iterator[StartDaemon]:
    """A function that starts a daemon, and waits for its registration if a broker is given."""
    with contextlib.ExitStack() as stack:

        def start(
            broker: RunningBroker | None = None, control: bool = False, handlers: Sequence[str] = ()
        ) -> RunningDaemon:
            keys, here = folder.parent / "keys", Path(__file__).parent
            # No prompts by programs that happen to be installed here.
            running = RunningDaemon(folder, keys, MODULES, [here], control, handlers, settings=ONLY_AGENT)
            stack.enter_context(running)
            if broker is not None:
                broker.registered(running.pid)
            return running

        yield start


@pytest.fixture
def daemon(broker: RunningBroker, start_daemon: StartDaemon) -> RunningDaemon:
    return start_daemon(broker)


@pytest.fixture
def gate(folder: Path) -> Iterator[Gate]:
    opened = Gate(folder.parent / "gate")
    yield opened
    opened.close()


@pytest.fixture
def closed_home() -> Iterator[Path]:
    """A home folder in which a hardened daemon may not write: not below /tmp, where it may."""
    for above in (Path.home(), Path("/run"), Path.cwd()):
        if os.access(above, os.W_OK) and not above.resolve().is_relative_to("/tmp"):
            break
    else:
        pytest.skip("there is no place outside of /tmp for a home folder")
    made = Path(tempfile.mkdtemp(prefix=".upcall-test-", dir=above))
    (made / ".ssh").mkdir()
    for name in (KEYS, ".bashrc"):
        (made / name).write_text("before")
    yield made
    shutil.rmtree(made)


@pytest.fixture
def open_port() -> Iterator[int]:
    """The port of a TCP listener."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


@pytest.fixture
def neighbour() -> Iterator[int]:
    """The pid of another process of this user, which ptrace would allow to inspect."""
    with subprocess.Popen(["sleep", "60"]) as sleeping:
        yield sleeping.pid
        sleeping.kill()

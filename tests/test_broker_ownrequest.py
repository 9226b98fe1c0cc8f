"""Self-deadlock detection: requests of a daemon or its descendants are refused at once, all others answered."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.selfasking import ask
from upcall.core.errors import REASONS, Refused
from upcall.core.messages import Answer, Refusal, Requester
from upcall.core.router import Router
from upcall.kernel.ancestry import line_of
from upcall.kernel.procfs import started_at as began
from upcall.protocols.catalogue import SERVICES
from upcall.protocols.request_key import origin
from upcall.testing.keys import FolderKeyring
from upcall.testing.processes import RunningBroker, RunningDaemon

KEY = bytes(16)
ASKING = "0123456789abcdef"


@pytest.fixture
def broker(folder: Path) -> Iterator[RunningBroker]:
    with RunningBroker(folder, related=True) as running:
        yield running


@pytest.mark.parametrize("manner", ["itself", "child", "grandchild"])
def test_a_request_of_the_daemon_or_its_descendants_is_refused_and_logged(
    broker: RunningBroker, daemon: RunningDaemon, keyring: FolderKeyring, signature: str, manner: str
) -> None:
    """Also while all workers of the key are busy: such requests would block them for ever."""
    keyring.add(ASKING, "asking", f"{manner} {broker.folder} {signature}".encode())
    with broker.client() as client:
        for _ in range(4):
            with pytest.raises(Refused, match="module-failed"):
                client.wrap(ASKING, KEY)
        assert client.unwrap(signature, client.wrap(signature, KEY)) == KEY
    daemon.logged("asked and own-request")
    assert f"daemon={daemon.pid}" in next(line for line in broker.log.splitlines() if "deadlock-refused" in line)
    assert broker.outcomes()["own-request"] == 4


def test_a_request_of_the_daemons_parent_or_sibling_is_answered(
    broker: RunningBroker, daemon: RunningDaemon, signature: str
) -> None:
    """The process that started the daemon, and another child of it."""
    assert ask(str(broker.folder), signature) == "answered"
    sister = [sys.executable, str(Path(__file__).with_name("selfasking.py")), "itself", str(broker.folder), signature]
    assert subprocess.run(sister, check=True, capture_output=True, timeout=60).stdout == b"answered\n"


def test_a_process_line_holds_its_ancestors_and_is_empty_for_unknown_pids() -> None:
    line = line_of(os.getpid())
    assert {pid for pid, _ in line} >= {os.getpid(), os.getppid()}
    assert (os.getpid(), began(os.getpid())) in line
    assert len(line_of(1)) == 1
    assert line_of(0) == line_of(1 << 30) == frozenset()


def test_a_request_is_not_taken_for_a_daemons_own_if_the_pid_was_reused() -> None:
    """A daemon with the same pid but a later start time is another process."""
    pid, when = os.getpid(), began(os.getpid())
    outcomes = [_outcome(pid, when), _outcome(pid, when + 1)]
    assert outcomes == [Refusal("own-request", errno.EDEADLK), None]
    assert REASONS["own-request"] == errno.EDEADLK


PROC_KEYS = """\
0a1b2c3d I--Q---     1 perm 3f030000     0     0 keyring   _ses: 1
1f2e3d4c I--Q---     2 perm 0b0b0000     0     0 .request_ key:2f5c pid:{pid} ci:4
1f2e3d4d I--Q---     2 perm 0b0b0000     0     0 .request_ key:2f5d pid:{gone} ci:0
1f2e3d4e I--Q---     1 perm 3f010000  1000  1000 user      x pid:{pid} ci:4 y: 3
"""


def test_the_requester_is_found_in_proc_keys_by_the_authorisation_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked up by serial number; a thread resolves to its process."""
    file = tmp_path / "keys"
    monkeypatch.setattr(origin, "KEYS", file)
    assert origin.asked_by(0x1F2E3D4C) == 0  # there is no such file
    file.write_text(PROC_KEYS.format(pid=threading.get_native_id(), gone=1 << 30))
    assert origin.asked_by(0x1F2E3D4C) == os.getpid()
    for serial in (0x1F2E3D4D, 0x1F2E3D4E, 0x0A1B2C3D, 1):
        assert origin.asked_by(serial) == 0


class _Link:
    def send(self, data: bytes) -> bool:
        return True

    def close(self) -> None:
        return None


class _Origin:
    wants_why = False
    outcome: Answer | Refusal | None = None

    def settle(self, outcome: Answer | Refusal) -> None:
        self.outcome = outcome


def _outcome(pid: int, when: int) -> Answer | Refusal | None:
    """How a request of this process ends at once, if the daemon is `pid` and began `when`."""
    broker, origin = Router(SERVICES, lambda event, **fields: None, random_u32=lambda: 0), _Origin()
    broker.helo(7, pid, 1, _Link(), 0.0, when)
    broker.ask(7, "key", Requester(7, os.getpid()), b"", origin, 0.0, line=line_of(os.getpid()))
    return origin.outcome


def test_a_pending_request_is_refused_to_a_newer_daemon_that_made_it() -> None:
    """A starting daemon asks its predecessor; once it has registered, its own request would be sent to it."""
    broker, origin = Router(SERVICES, lambda event, **fields: None, random_u32=lambda: 0), _Origin()
    broker.helo(7, 1, 1, _Link(), 0.0, 1)
    broker.ask(7, "key", Requester(7, os.getpid()), b"", origin, 0.0, line=line_of(os.getpid()))
    assert origin.outcome is None
    broker.helo(7, os.getpid(), 2, _Link(), 0.0, began(os.getpid()))
    assert origin.outcome == Refusal("own-request", errno.EDEADLK)

"""What commands and programs are told when their own daemon refuses a key."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from upcall.async_client import AsyncClient
from upcall.cli import main
from upcall.core.errors import Refused
from upcall.process.control import DaemonControl
from upcall.testing.keys import FolderKeyring
from upcall.testing.processes import RunningBroker, StartDaemon
from upcall.testing.toy import make_toy_key

PASSPHRASE = b"open sesame"
pytestmark = pytest.mark.usefixtures("runtime_folder")


@pytest.fixture
def protected(folder: Path, keyring: FolderKeyring) -> str:
    name, blob = make_toy_key(folder.parent / "protected.key", PASSPHRASE)
    return keyring.add(name, "toy", blob)


def said(broker: RunningBroker, key: str, code: int) -> str:
    """Returns what `upcall wrap` says on standard error."""
    result = CliRunner().invoke(main, ["wrap", key, "--runtime", str(broker.folder)], input=b"0123456789abcdef")
    assert result.exit_code == code, result.stderr
    assert result.stdout == "" and result.stderr.startswith("upcall: ") and result.stderr.count("\n") == 1
    return result.stderr.strip()


def test_without_a_daemon_wrap_names_the_command_that_starts_it(broker: RunningBroker) -> None:
    text = said(broker, "0123456789abcdef", os.EX_UNAVAILABLE)
    assert text.startswith("upcall: no daemon of this user is registered with the broker (no-daemon): start it: `")


def test_a_key_that_is_not_in_the_keyring_names_key_add(broker: RunningBroker, start_daemon: StartDaemon) -> None:
    start_daemon(broker)
    text = said(broker, "0123456789abcdef", os.EX_UNAVAILABLE)
    assert text.endswith("(no-key): add it: `upcall key add 0123456789abcdef`")


def test_a_passphrase_that_is_needed_names_upcall_prompt(
    broker: RunningBroker, start_daemon: StartDaemon, protected: str
) -> None:
    start_daemon(broker, control=True)
    text = said(broker, protected, os.EX_NOPERM)
    assert '(locked; the daemon says "it needs its passphrase: run `upcall prompt` in a terminal' in text
    assert text.endswith(f"run `upcall unlock {protected}`")


def test_a_locked_key_says_since_when_and_by_what(
    broker: RunningBroker, start_daemon: StartDaemon, protected: str
) -> None:
    start_daemon(broker, control=True)
    with DaemonControl() as control:
        control.lock(protected)
    text = said(broker, protected, os.EX_NOPERM)
    assert '(locked; the daemon says "locked since ' in text and '(upcall lock)")' in text


def test_a_wrong_passphrase_is_told_in_the_modules_own_words(
    broker: RunningBroker, start_daemon: StartDaemon, protected: str
) -> None:
    start_daemon(broker, control=True)
    with DaemonControl() as control:
        control.unlock(protected, bytearray(b"wrong"))
    text = said(broker, protected, os.EX_DATAERR)
    assert "(module-failed; the daemon says " in text
    with broker.client() as client, pytest.raises(Refused) as refused:
        client.wrap(protected, b"0123456789abcdef")
    assert refused.value.why and refused.value.why in text
    assert refused.value.key == protected

    async def wrap() -> None:
        async with AsyncClient(broker.folder) as client:
            await client.wrap(protected, b"0123456789abcdef")

    with pytest.raises(Refused) as again:
        asyncio.run(wrap())
    assert (again.value.why, str(again.value)) == (refused.value.why, str(refused.value))

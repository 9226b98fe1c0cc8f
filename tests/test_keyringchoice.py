"""Which backend the keyring library chooses, how upcall describes it, and that the daemon does not import it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from keyring.errors import PasswordSetError

from upcall.keys import keyring_choice as keyringchoice
from upcall.keys.keyring_backend import KernelKeyring, unusable
from upcall.keys.passphrase import fetch_from_keyring
from upcall.testing.keys import FolderKeyring
from upcall.testing.processes import RunningBroker, RunningDaemon
from upcall.testing.toy import make_toy_key

OURS = "upcall.keys.keyring_backend.KernelKeyring"
WORD = "correct horse"
needs_keyrings = pytest.mark.skipif(bool(unusable()), reason=unusable())


@pytest.fixture(autouse=True)
def container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A keyring in the kernel for this test alone, and a configuration that is empty."""
    name = f"upcall-test-{os.urandom(6).hex()}"
    monkeypatch.setenv("KEYRING_PROPERTY_CONTAINER", name)
    monkeypatch.setenv("PYTHON_KEYRING_BACKEND", OURS)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", "unix:path=/nonexistent")
    yield name
    if not unusable():
        from tests.test_keyringbackend import dropped

        dropped(name)


def chosen(code: str = "") -> keyringchoice.Choice:
    """In a process of its own: the library chooses once."""
    code += "\nimport json; from upcall.keys.keyring_choice import chosen; print(json.dumps(chosen()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return keyringchoice.Choice(*json.loads(done.stdout))


@needs_keyrings
def test_our_backend_passes_its_trial_and_is_described() -> None:
    assert chosen() == (OURS, 0.9, True, False, "the kernel keeps it, at most until the next boot")
    backend = KernelKeyring()
    assert backend.get_credential("upcall:trial", None) is None  # nothing is left of it


@needs_keyrings
def test_our_backend_is_chosen_where_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHON_KEYRING_BACKEND")
    found = chosen("import upcall.keys.keyring_backend")  # the entry point does that once upcall is installed
    assert found.backend == OURS and found.headless


@needs_keyrings
def test_our_backend_is_reported_as_failing_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYRING_PROPERTY_TIMEOUT", "soon")
    found = chosen()
    assert found[:4] == (OURS, 0.9, False, False)
    assert found.why.startswith("does not work: the property timeout is 'soon'")


def test_without_any_backend_the_reason_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHON_KEYRING_BACKEND", "keyring.backends.fail.Keyring")
    forbidden = (
        "import upcall.keys.keyring_backend as b; from upcall.kernel import keyring as k; k.capabilities = lambda: 0"
    )
    assert chosen(forbidden) == (
        "keyring.backends.fail.Keyring",
        0,
        False,
        False,
        "keeps nothing; the kernel's keyring: Linux 5.3 or newer is needed",
    )


def test_of_chained_backends_the_first_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a desktop's keyring beside ours, the desktop's receives the password."""
    monkeypatch.delenv("PYTHON_KEYRING_BACKEND")
    desktop = (
        "import upcall.keys.keyring_backend\n"
        "from keyring.backends import SecretService\n"
        "class Keyring(SecretService.Keyring):\n"
        "    priority = 5\n"
        "Keyring.__module__ = 'keyring.backends.SecretService'\n"
    )
    assert chosen(desktop) == (
        "keyring.backends.SecretService.Keyring",
        5,
        False,
        True,
        "needs the desktop's session, and somebody who unlocks it",
    )


def test_an_unknown_backend_is_reported_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHON_KEYRING_BACKEND")
    theirs = (
        "import keyring\n"
        "from keyring.backend import KeyringBackend\n"
        "class Theirs(KeyringBackend):\n"
        "    priority = 1\n"
        "    def get_password(self, service, username): return None\n"
        "    def set_password(self, service, username, password): pass\n"
        "keyring.set_keyring(Theirs())\n"
    )
    assert chosen(theirs) == ("__main__.Theirs", 1, None, None, "a backend that upcall knows nothing about")


@pytest.mark.parametrize("name", ["nobody.has.this", "keyring.backends.fail.Missing"])
def test_a_missing_backend_is_reported_as_an_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("PYTHON_KEYRING_BACKEND", name)
    found = chosen()
    assert (found.backend, found.headless) == ("", False)
    assert found.why.startswith("the keyring library cannot start: ")


@needs_keyrings
def test_a_backend_that_cannot_set_or_return_a_password_fails_its_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise PasswordSetError("the kernel holds no more keys")

    monkeypatch.setattr(KernelKeyring, "set_password", full)
    assert keyringchoice._failure(KernelKeyring()) == "the kernel holds no more keys"
    monkeypatch.undo()
    monkeypatch.setattr(KernelKeyring, "get_password", lambda *_: None)
    assert keyringchoice._failure(KernelKeyring()) == "what was set does not come back"


# --- passphrases of keys ---------------------------------------------------------------------------------------


@needs_keyrings
def test_a_passphrase_is_fetched_from_our_backend() -> None:
    KernelKeyring().set_password("upcall", "0123456789abcdef", WORD)
    assert fetch_from_keyring("0123456789abcdef", 20) == WORD.encode()


def test_the_daemon_starts_without_importing_the_keyring_library() -> None:
    code = (
        "import sys, upcall.daemon.__main__\n"
        "heavy = ('keyring', 'jaraco', 'secretstorage', 'upcall.keys.passphrase', 'upcall.keys.keyring_backend')\n"
        "print([name for name in sys.modules if name.startswith(heavy)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


@needs_keyrings
def test_fetching_a_passphrase_imports_no_keyring_library_into_the_daemon(
    broker: RunningBroker, folder: Path, keyring: FolderKeyring
) -> None:
    """tests/lean.py checks, in the daemon, once the passphrase has been fetched."""
    signature, blob = make_toy_key(folder.parent / "toy.key", WORD.encode())
    keyring.add(signature, "lean", blob.removesuffix(b"ask") + b"keyring")
    KernelKeyring().set_password("upcall", signature, WORD)
    keys, here = folder.parent / "keys", Path(__file__).parent
    with RunningDaemon(folder, keys, {"lean": "lean:LEAN"}, [here]) as daemon:
        broker.registered(daemon.pid)
        with broker.client() as client:
            assert client.unwrap(signature, client.wrap(signature, b"0123456789abcdef")) == b"0123456789abcdef"

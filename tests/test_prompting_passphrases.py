"""Passphrases from a person's terminal to a key, when it is first needed: a real broker, a real daemon."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.test_prompting_daemon import IMPATIENT, asked, found_in_memory, terminal
from upcall.keys.store import Entry, KeyStore
from upcall.process.control import DaemonControl
from upcall.testing.keys import FolderKeyring
from upcall.testing.processes import ONLY_AGENT, RunningBroker, RunningDaemon, until
from upcall.testing.toy import make_toy_key

PASSPHRASE = "correct horse"
Asking = Callable[[str], "Future[str]"]


@pytest.fixture(autouse=True)
def home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, variable in (("run", "XDG_RUNTIME_DIR"), ("data", "XDG_DATA_HOME")):
        (folder.parent / name).mkdir(mode=0o700)
        monkeypatch.setenv(variable, str(folder.parent / name))
    return folder.parent


@pytest.fixture(params=["inline", "isolated"])
def daemon(request: pytest.FixtureRequest, folder: Path, broker: RunningBroker) -> Iterator[RunningDaemon]:
    apart, spec = request.param == "isolated", {"toy": "upcall.testing.toy:TOY"}
    started = RunningDaemon(
        folder,
        folder.parent / "keys",
        {} if apart else spec,
        control=True,
        isolated=spec if apart else {},
        settings=ONLY_AGENT,
    )
    with started:
        broker.registered(started.pid)
        yield started


@pytest.fixture
def key(home: Path, keyring: FolderKeyring) -> str:
    name, blob = make_toy_key(home / "protected.key", PASSPHRASE.encode())
    return keyring.add(name, "toy", blob)


@pytest.fixture
def asking(broker: RunningBroker) -> Iterator[Asking]:
    with ThreadPoolExecutor() as pool:
        yield lambda signature: pool.submit(asked, broker, signature)


def test_a_passphrase_is_asked_for_once_and_the_key_stays_open(
    broker: RunningBroker, daemon: RunningDaemon, key: str, asking: Asking
) -> None:
    when = datetime.datetime.now(datetime.UTC)
    KeyStore().save(Entry("mail", "toy", key, "ask", "toy", when, None, b"x"))
    (KeyStore().directory / "a-broken.toml").write_text("not = [")
    with terminal() as typist:
        answers = [asking(key), asking(key)]
        typist.expect("Passphrase of a key")
        typist.expect(f"Key: mail ({key})")
        typist.expect(f"(pid {os.getpid()}")
        typist.expect("Passphrase: ")
        typist.type(PASSPHRASE + "\n")
        assert [answer.result() for answer in answers] == ["answered", "answered"]
        assert asked(broker, key) == "answered"
    assert typist.seen.count("Passphrase: ") == 1
    assert PASSPHRASE not in typist.seen + daemon.log
    assert asked(broker, key) == "answered"  # with nobody there


def test_a_short_request_is_refused_as_prompting_and_answered_when_repeated(
    broker: RunningBroker, daemon: RunningDaemon, key: str
) -> None:
    with terminal() as typist:
        assert asked(broker, key, IMPATIENT) == "prompting"
        typist.expect("Passphrase: ")
        assert asked(broker, key, IMPATIENT) == "prompting"
        typist.type(PASSPHRASE + "\n")
        daemon.logged("outcome=answered")
        with DaemonControl() as control:  # it is open already, and nobody had to wait for that
            assert {"signature": key, "module": "toy", "open": True} in control.status()["keys"]
        assert asked(broker, key, IMPATIENT) == "answered"
    assert typist.seen.count("Passphrase: ") == 1


def test_a_wrong_passphrase_is_reported_and_asked_for_again(
    broker: RunningBroker, daemon: RunningDaemon, key: str, asking: Asking
) -> None:
    with terminal() as typist:
        answer = asking(key)
        for left in ("2 more times", "1 more time."):
            typist.expect("Passphrase: ")
            typist.type("hunter2\n")
            typist.expect(f"That does not open it. You are asked {left}")
        typist.expect("Passphrase: ")
        typist.type(PASSPHRASE + "\n")
        assert answer.result() == "answered"
    assert "hunter2" not in typist.seen + daemon.log


def test_after_three_wrong_passphrases_requests_are_refused_until_an_unlock(
    broker: RunningBroker, daemon: RunningDaemon, key: str, asking: Asking
) -> None:
    with terminal() as typist:
        answer = asking(key)
        for _ in range(3):
            typist.expect("Passphrase: ")
            typist.type("hunter2\n")
        assert answer.result() == "locked"
        daemon.logged("outcome=wrong")
        assert asked(broker, key) == "locked"  # nobody is asked for a while
        with DaemonControl() as control:
            control.unlock_all()  # a person is there
        answer = asking(key)
        typist.expect("Passphrase: ")
        typist.type(PASSPHRASE + "\n")
        assert answer.result() == "answered"


def test_after_a_cancelled_prompt_requests_are_refused_without_asking(
    broker: RunningBroker, daemon: RunningDaemon, key: str, asking: Asking
) -> None:
    with terminal() as typist:
        answer = asking(key)
        typist.expect("Passphrase: ")
        typist.type(b"\x03")
        assert answer.result() == "locked"
        assert asked(broker, key) == "locked"
    assert typist.seen.count("Passphrase: ") == 1


def test_lock_withdraws_the_prompt_and_refuses_the_request(
    broker: RunningBroker, daemon: RunningDaemon, key: str, asking: Asking
) -> None:
    with terminal() as typist:
        answer = asking(key)
        typist.expect("Passphrase: ")
        with DaemonControl() as control:
            control.lock(None)
        typist.expect("too late")
        assert answer.result() == "locked"
        assert asked(broker, key) == "locked"  # and nobody is asked until a person unlocks it
        assert typist.seen.count("Passphrase: ") == 1


def test_without_a_terminal_requests_are_refused_and_the_log_names_upcall_prompt(
    broker: RunningBroker, daemon: RunningDaemon, key: str
) -> None:
    assert asked(broker, key) == "locked"
    daemon.logged("run `upcall prompt` in a terminal")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root reads the memory of a process that is not dumpable")
def test_no_passphrase_is_left_in_the_daemons_memory_after_a_lock(
    broker: RunningBroker, daemon: RunningDaemon, key: str, asking: Asking
) -> None:
    wrong = os.urandom(6).hex()
    with terminal() as typist:
        answer = asking(key)
        for word in (wrong, PASSPHRASE):
            typist.expect("Passphrase: ")
            typist.type(word + "\n")
        assert answer.result() == "answered"
    assert not found_in_memory(daemon.pid, wrong.encode())
    assert found_in_memory(daemon.pid, PASSPHRASE.encode())  # it is kept
    with DaemonControl() as control:
        control.lock(None)
    assert not found_in_memory(daemon.pid, PASSPHRASE.encode())


def test_a_key_removed_during_its_prompt_is_refused_as_no_key(
    broker: RunningBroker, daemon: RunningDaemon, key: str, asking: Asking, keyring: FolderKeyring
) -> None:
    with terminal() as typist:
        answer = asking(key)
        typist.expect("Passphrase: ")
        keyring.remove(key)
        typist.type(PASSPHRASE + "\n")
        assert answer.result() == "locked"
        daemon.logged("outcome=no-key")
        assert asked(broker, key) == "no-key"


def test_the_commands_lock_and_unlock_close_and_open_keys(
    broker: RunningBroker, daemon: RunningDaemon, signature: str
) -> None:
    def run(*arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "upcall", *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stderr
        return done.stdout

    assert asked(broker, signature) == "answered"
    assert run("lock", "--json") == '{"all": true, "signature": null, "forgotten": 1}\n'
    assert asked(broker, signature) == "locked"
    assert run("unlock", "--json") == '{"all": true, "unlocked": []}\n'
    assert asked(broker, signature) == "answered"
    assert run("lock") == "all keys are locked\n"
    daemon.kill()
    until(lambda: broker.daemon() is None, "it has gone")
    assert run("lock", code=os.EX_UNAVAILABLE) == ""

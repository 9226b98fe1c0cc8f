"""PINs from a person's terminal to a key module and back, through a real broker and a real daemon."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.carded import PIN, make_card_key
from tests.typing_there import Typist
from upcall.core.errors import Refused
from upcall.core.messages import Requester
from upcall.daemon import secrets
from upcall.daemon.prompting.prompts import Prompts
from upcall.daemon.prompting.question import Question, Turn
from upcall.daemon.prompting.settings import PIN_TIME, PROMPT_TIME, PromptSettings
from upcall.daemon.secrets import PATIENT, Asker
from upcall.daemon.settings import DaemonSettings
from upcall.process.control import DaemonControl
from upcall.process.log import EventLog
from upcall.protocols.ecryptfs.settings import LockSettings
from upcall.testing.keys import FolderKeyring
from upcall.testing.processes import ONLY_AGENT, RunningBroker, RunningDaemon, in_time, until

KEY = b"0123456789abcdef"
TYPED = PIN.decode() + "\n"
IMPATIENT = PATIENT - 0.5  # seconds; eCryptfs waits for half of that, which may be short on a busy machine

Start = Callable[..., RunningDaemon]


def agent(pin_time: float = PIN_TIME, prompt_time: float = PROMPT_TIME) -> DaemonSettings:
    """Prompts in `upcall prompt` only, with these times."""
    return DaemonSettings(prompting=PromptSettings(("agent",), None, pin_time, prompt_time))


pytestmark = pytest.mark.usefixtures("runtime_folder")


class Card:
    """Keys in a token that notes how it is tried."""

    def __init__(self, folder: Path, keyring: FolderKeyring) -> None:
        self._tries, self._keyring = folder.parent / "tries", keyring

    def key(self, label: str = "one", token: str = "card", manner: str = "") -> str:
        signature, blob = make_card_key(self._tries, label, token, manner)
        return self._keyring.add(signature, "card", blob)

    @property
    def tries(self) -> list[str]:
        return self._tries.read_text().split() if self._tries.exists() else []


@pytest.fixture
def card(folder: Path, keyring: FolderKeyring) -> Card:
    return Card(folder, keyring)


@pytest.fixture(params=["inline", "isolated"])
def manner(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def start(folder: Path, broker: RunningBroker) -> Iterator[Start]:
    with contextlib.ExitStack() as stack:

        def started(manner: str = "inline", settings: DaemonSettings = ONLY_AGENT) -> RunningDaemon:
            spec = {"card": "carded:CARD"}
            running = RunningDaemon(
                folder,
                folder.parent / "keys",
                {} if manner == "isolated" else spec,
                [Path(__file__).parent],
                control=True,
                isolated=spec if manner == "isolated" else {},
                settings=settings,
            )
            stack.enter_context(running)
            broker.registered(running.pid)
            return running

        yield started


@contextlib.contextmanager
def terminal() -> Iterator[Typist]:
    """`upcall prompt`, attached."""
    with Typist(["-m", "upcall", "prompt"]) as typist:
        typist.expect("PINs are asked for here")
        yield typist


def asked(broker: RunningBroker, signature: str, timeout: float = 10.0) -> str:
    with broker.client(timeout) as client:
        try:
            client.wrap(signature, KEY)
        except Refused as refused:
            return refused.reason
    return "answered"


@pytest.fixture
def asking(broker: RunningBroker) -> Iterator[Callable[[str], Future[str]]]:
    with ThreadPoolExecutor() as pool:
        yield lambda signature: pool.submit(asked, broker, signature)


Asking = Callable[[str], "Future[str]"]


def test_a_request_that_can_wait_is_answered_once_the_pin_is_typed(
    broker: RunningBroker, start: Start, card: Card, asking: Asking, manner: str
) -> None:
    daemon = start(manner)
    with terminal() as typist:
        answer = asking(card.key())
        typist.expect("PIN of the card")
        typist.expect("Token: card")
        typist.expect(f"(pid {os.getpid()}")
        typist.expect("by the service key")
        typist.expect("Started by: ")
        typist.expect("PIN: ")
        typist.type(TYPED)
        assert answer.result() == "answered"
        assert asked(broker, card.key("two")) == "answered"  # nobody is asked again
    assert card.tries == ["good", "good"]
    assert PIN.decode() not in typist.seen
    assert PIN.decode() not in daemon.log


def test_a_short_request_is_refused_as_prompting_and_answered_when_repeated(
    broker: RunningBroker, start: Start, card: Card, manner: str
) -> None:
    daemon, key = start(manner), card.key()
    with terminal() as typist:
        assert asked(broker, key, IMPATIENT) == "prompting"
        assert asked(broker, key, IMPATIENT) == "prompting"
        typist.expect("PIN: ")
        typist.type(TYPED)
        daemon.logged("outcome=answered")
        assert asked(broker, key, IMPATIENT) == "answered"
    assert typist.seen.count("PIN: ") == 1
    assert card.tries == ["good"]


@pytest.mark.parametrize("kind", ["pin", "passphrase"])
def test_one_that_cannot_wait_is_refused_before_its_deadline(kind: str) -> None:
    """At once: its deadline is an hour away, and the person has as long."""

    class Hasty(Asker):
        def patient(self) -> bool:
            return False

    class Thinking:
        name = "thinking"

        def available(self) -> bool:
            return True

        def ask(self, question: Question, turn: Turn, /) -> bytearray:
            ours, theirs = socket.socketpair()
            with ours, theirs:
                turn.wait(ours.fileno())  # until it is withdrawn
            raise AssertionError("nothing comes there")

        def notify(self, question: Question, turn: Turn, /) -> bool:
            return False

    log = EventLog("daemon", os.open(os.devnull, os.O_WRONLY))
    prompts = Prompts([Thinking()], PromptSettings(prompt_time=3600.0), log)
    asker = Hasty("ecryptfs", Requester(os.getuid(), 0), time.monotonic() + 3600.0)
    try:
        with pytest.raises(Refused, match="prompting"):
            if kind == "pin":
                in_time(lambda: prompts.pin("card", "PIN of the card", asker), "an answer")
            else:
                in_time(lambda: prompts.passphrases.ask("f" * 16, asker, lambda: None, lambda _: True), "an answer")
    finally:
        prompts.lock()


def test_what_cannot_wait_for_a_person(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "time", SimpleNamespace(monotonic=lambda: 100.0))
    asker = Asker("ecryptfs", Requester(0, 0), 102.5)
    assert not asker.patient()
    assert not asker._replace(deadline=104.9).patient()
    assert asker._replace(deadline=105.0).patient()


def test_requests_for_one_token_share_one_prompt_and_one_try(
    broker: RunningBroker, start: Start, card: Card, asking: Asking, manner: str
) -> None:
    start(manner)
    keys = [card.key("one"), card.key("two")]
    with terminal() as typist:
        answers = [asking(key) for key in keys]
        typist.expect("PIN: ")
        broker.pending(2)
        typist.type("wrong\n")
        until(lambda: card.tries == ["wrong"], "one try")  # the other request does not use up another one
        typist.expect("1 wrong PIN so far: you are asked 1 more time")
        typist.expect("PIN: ")
        typist.type(TYPED)
        assert sorted(answer.result() for answer in answers) == ["answered", "module-failed"]
    assert card.tries == ["wrong", "good"]


def test_ecryptfs_does_not_queue_behind_requests_that_wait_for_a_pin(
    broker: RunningBroker, start: Start, card: Card, asking: Asking
) -> None:
    start()
    other = card.key("two")
    with terminal() as typist:
        answer = asking(card.key("one"))
        typist.expect("PIN: ")
        assert asked(broker, other, IMPATIENT) == "prompting"
        typist.type(TYPED)
        assert answer.result() == "answered"


def test_after_two_wrong_pins_requests_are_refused_until_an_unlock(
    broker: RunningBroker, start: Start, card: Card, asking: Asking, manner: str
) -> None:
    daemon, key = start(manner), card.key(manner="again")
    with terminal() as typist:
        answer = asking(key)
        for _ in range(2):
            typist.expect("PIN: ")
            typist.type("31415\n")
        assert answer.result() == "pin-refused"
        assert asked(broker, key) == "pin-refused"
        assert asked(broker, card.key("two"), IMPATIENT) == "pin-refused"
        daemon.logged("upcall key unlock")
        with DaemonControl() as control:
            control.unlock(key, bytearray())  # asks at once, in nobody's name
        typist.expect("your daemon itself")
        typist.expect("2 wrong PINs so far: another one may lock the token!")
        typist.expect("PIN: ")
        typist.type(TYPED)
        daemon.logged("outcome=answered", 10)
        until(lambda: asked(broker, key) == "answered", "the key is open")
    assert card.tries == ["wrong", "wrong", "good"]
    assert "31415" not in daemon.log + typist.seen


def test_a_try_without_a_verdict_counts_as_a_wrong_pin(
    broker: RunningBroker, start: Start, card: Card, asking: Asking, manner: str
) -> None:
    """A token that was taken out, or a module that crashed, may have counted it."""
    start(manner)
    key = card.key(manner="mute")
    with terminal() as typist:
        for _ in range(2):
            answer = asking(key)
            typist.expect("PIN: ")
            typist.type(TYPED)
            assert answer.result() == "module-failed"
        assert asked(broker, key) == "pin-refused"


def test_after_a_cancelled_prompt_requests_are_refused_without_asking(
    broker: RunningBroker, start: Start, card: Card, asking: Asking
) -> None:
    start()
    key = card.key()
    with terminal() as typist:
        for no in (b"\x03", b"\x04", b"\n"):
            answer = asking(key)
            typist.expect("PIN: ")
            typist.type(no)
            assert answer.result() == "locked"
            typist.expect("refused")
            assert asked(broker, key, IMPATIENT) == "locked"
            assert asked(broker, card.key("two")) == "locked"
            with DaemonControl() as control:
                control.unlock("0" * 16, bytearray())  # a person who unlocks anything is there again
    assert card.tries == []


def test_lock_forgets_the_pin_and_withdraws_the_prompt(
    broker: RunningBroker, start: Start, card: Card, asking: Asking, manner: str
) -> None:
    start(manner)
    key = card.key()
    with terminal() as typist:
        answer = asking(key)
        typist.expect("PIN: ")
        typist.type(TYPED)
        assert answer.result() == "answered"
        with DaemonControl() as control:
            control.lock(key)
            assert asked(broker, key) == "locked"
        answer = asking(card.key("two"))  # the same token's PIN is not there any more
        typist.expect("PIN: ")
        with DaemonControl() as control:
            control.lock(None)  # the prompt is taken away
        typist.expect("too late")
        assert answer.result() == "locked"
    assert card.tries == ["good"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root reads the memory of a process that is not dumpable")
def test_nothing_of_a_pin_is_left_in_the_daemon(
    broker: RunningBroker, start: Start, card: Card, asking: Asking
) -> None:
    daemon, word = start("isolated"), os.urandom(6).hex()
    with terminal() as typist:
        for typed, outcome in ((word, "module-failed"), (PIN.decode(), "answered")):
            answer = asking(card.key())
            typist.expect("PIN: ")
            typist.type(typed + "\n")
            assert answer.result() == outcome
    assert found_in_memory(daemon.pid, PIN)  # it is kept
    assert not found_in_memory(daemon.pid, word.encode())
    with DaemonControl() as control:
        control.lock(None)
    assert not found_in_memory(daemon.pid, PIN)


def found_in_memory(pid: int, word: bytes) -> bool:
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            start, end = (int(one, 16) for one in line.split()[0].split("-"))
            if " rw" in line and "[v" not in line:
                memory.seek(start)
                with contextlib.suppress(OSError):
                    if word in memory.read(end - start):
                        return True
    return False


@pytest.mark.parametrize(
    ("settings", "seconds"),
    [
        (agent(pin_time=0.0), 0.0),
        (agent(pin_time=0.2), 0.2),
        (ONLY_AGENT._replace(locking=LockSettings(after=0.2)), 0.2),
    ],
    ids=["pin-time=0", "pin-time=0.2", "lock-after=0.2"],
)
def test_a_pin_is_asked_for_again_after_its_time(
    broker: RunningBroker, start: Start, card: Card, asking: Asking, settings: DaemonSettings, seconds: float
) -> None:
    start("inline", settings)
    with terminal() as typist:
        for label in ("one", "two"):
            answer = asking(card.key(label))
            typist.expect("PIN: ")
            typist.type(TYPED)
            assert answer.result() == "answered"
            threading.Event().wait(seconds)
    assert card.tries == ["good", "good"]


def test_a_pin_that_is_not_kept_serves_all_that_waited_for_it(start: Start, card: Card, asking: Asking) -> None:
    daemon = start("inline", agent(pin_time=0.0))
    with terminal() as typist:
        answers = [asking(card.key(label)) for label in ("one", "two")]
        typist.expect("PIN: ")
        daemon.logged("prompt-joined")
        typist.type(TYPED)
        results = [answer.result() for answer in answers]
    assert results == ["answered", "answered"]
    assert typist.seen.count("PIN: ") == 1


def test_an_ignored_prompt_is_withdrawn_and_the_request_refused(
    broker: RunningBroker, start: Start, card: Card
) -> None:
    daemon = start("inline", agent(prompt_time=0.3))
    with terminal() as typist:
        assert asked(broker, card.key()) == "locked"
        typist.expect("too late")
    daemon.logged("outcome=unanswered")


def test_without_a_terminal_requests_are_refused_and_the_log_names_upcall_prompt(
    broker: RunningBroker, start: Start, card: Card, asking: Asking
) -> None:
    daemon, key = start(), card.key()
    assert asked(broker, key) == "locked"
    daemon.logged("run `upcall prompt` in a terminal")
    with terminal() as typist:
        answer = asking(key)
        typist.expect("PIN: ")
        typist.type(TYPED)
        assert answer.result() == "answered"


def test_a_terminal_closed_during_a_prompt_does_not_count_as_cancelled(
    broker: RunningBroker, start: Start, card: Card, asking: Asking
) -> None:
    daemon, key = start(), card.key()
    with terminal() as typist:
        answer = asking(key)
        typist.expect("PIN: ")
        typist.close_window()
        assert answer.result() == "locked"
        daemon.logged("terminal-gone")
        assert typist.ended() != 0
    with terminal() as typist:  # and is no "no": the next terminal is asked at once
        answer = asking(key)
        typist.expect("PIN: ")
        typist.type(TYPED)
        assert answer.result() == "answered"


def test_a_newer_terminal_takes_over_with_the_question(start: Start, card: Card, asking: Asking) -> None:
    start()
    with terminal() as first:
        answer = asking(card.key())
        first.expect("PIN: ")
        with terminal() as second:
            second.expect("PIN: ")
            first.expect("another terminal answers prompts now")
            assert first.ended() == 0
            second.type(TYPED)
            assert answer.result() == "answered"
            second.type(b"\x03")
            assert second.ended() == 0


def test_a_touch_is_asked_for_once_within_a_few_seconds(
    broker: RunningBroker, start: Start, card: Card, asking: Asking, manner: str
) -> None:
    start(manner)
    with terminal() as typist:
        answer = asking(card.key(manner="touch"))
        typist.expect("Touch the card")
        typist.expect("PIN: ")
        typist.type(TYPED)
        assert answer.result() == "answered"
        assert asked(broker, card.key("two", manner="touch")) == "answered"
        assert asked(broker, card.key("three")) == "answered"
    assert typist.seen.count("Touch the card") == 1  # not twice within a few seconds


def test_the_daemon_serves_others_while_it_asks(
    broker: RunningBroker, start: Start, card: Card, asking: Asking
) -> None:
    start()
    with terminal() as typist:
        answer = asking(card.key())
        typist.expect("PIN: ")
        with DaemonControl() as control:  # its main thread is not held up
            assert control.status()["keys"] == []
        typist.type(TYPED)
        assert answer.result() == "answered"


def test_prompting_is_not_imported_before_it_is_needed() -> None:
    program = (
        "import sys; from upcall.daemon import __main__; from upcall.daemon.prompter import LazyPrompter; "
        "from upcall.daemon.prompting.settings import PromptSettings; "
        "one = LazyPrompter(PromptSettings(), None); one.over(); one.lock(); one.unlock(); "
        "print(*(name for name in sys.modules if name.startswith('upcall.daemon.prompting.') or name == 'subprocess'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "upcall.daemon.prompting.settings\n"  # a few numbers


def test_a_failing_pinentry_falls_back_to_password_agents(
    start: Start, card: Card, asking: Asking, folder: Path, runtime_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next way is tried where one cannot."""
    monkeypatch.setenv("DISPLAY", ":0")
    pinentry = folder.parent / "pinentry"
    answer = f"echo 'D {PIN.decode()}'; echo OK"
    script = "#!/bin/sh\necho OK; while read -r line; do case $line in GETPIN) %s;; *) echo OK;; esac; done\n"
    pinentry.write_text(script % answer)
    pinentry.chmod(0o755)
    place = runtime_folder / "systemd" / "ask-password"
    place.mkdir(parents=True)
    daemon = start("inline", DaemonSettings(prompting=PromptSettings(pinentry=str(pinentry))))
    assert asking(card.key("one")).result() == "answered"
    pinentry.write_text(script % "exit 1")
    answered = asking(card.key("two", token="other"))
    (ask,) = until(lambda: list(place.glob("ask.*")) or None, "a question for the agents")
    (target,) = (line.removeprefix("Socket=") for line in ask.read_text().splitlines() if line.startswith("Socket="))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"+" + PIN + b"\0", target)
    assert answered.result() == "answered"
    daemon.logged("prompt-failed way=pinentry")
    assert PIN.decode() not in daemon.log


def test_upcall_prompt_ends_with_the_daemon(start: Start) -> None:
    daemon = start()
    with terminal() as typist:
        daemon.kill()
        typist.expect("the daemon has ended")
        assert typist.ended() == os.EX_UNAVAILABLE


def test_an_unknown_way_of_asking_is_a_usage_error() -> None:
    done = subprocess.run([sys.executable, "-m", "upcall", "daemon", "--ask", "moon"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (64, "upcall: --ask moon: there are agent, pinentry, systemd\n")


def test_a_daemon_that_asks_by_pinentry_only_refuses_a_terminal(start: Start) -> None:
    start("inline", DaemonSettings(prompting=PromptSettings(("pinentry",))))
    with Typist(["-m", "upcall", "prompt"]) as typist:
        typist.expect("no-service")
        assert typist.ended() == os.EX_UNAVAILABLE

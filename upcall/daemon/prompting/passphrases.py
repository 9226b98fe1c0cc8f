"""Prompts for the passphrases of keys when they are first needed, and tries them while the prompt is open."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Protocol

from upcall.core.errors import Refused, UpcallError
from upcall.daemon.prompting.question import Question, Turn
from upcall.daemon.prompting.requester import describe, plain
from upcall.daemon.prompting.settings import HINT, MARGIN, MAX_OPEN, WAIT, PromptSettings
from upcall.daemon.secrets import Asker
from upcall.process.log import EventLog

_WORDS = "Passphrase of a key"
_QUIETENING = frozenset(
    {"cancelled", "unanswered", "wrong"}
)  # outcomes after which no prompt opens for `Settings.quiet` seconds

Kept = Callable[[], bytearray | None]
Tried = Callable[[bytearray], bool]


class AskPerson(Protocol):
    """`prompts.Prompts.ask`."""

    def __call__(self, question: Question, turn: Turn, **what: object) -> tuple[bytearray | None, str]: ...


class _PassphrasePrompt:
    """An open prompt for one key."""

    __slots__ = ("outcome", "over", "turn", "withdrawn")

    def __init__(self) -> None:
        self.outcome = "withdrawn"  # how it ended
        self.turn: Turn | None = None  # while it is shown
        self.over = self.withdrawn = False


class Passphrases:
    """Runs each passphrase prompt in a thread of its own, as for PINs. Thread-safe. `anybody()`: whether a method may
    reach a person. `person`: a lock, held while a prompt is shown."""

    def __init__(
        self,
        ask: AskPerson,
        anybody: Callable[[], bool],
        person: threading.Lock,
        settings: PromptSettings,
        log: EventLog,
    ) -> None:
        self._ask_person, self._anybody, self._person = ask, anybody, person
        self._settings, self._log = settings, log
        self._change = threading.Condition()
        self._prompts: dict[str, _PassphrasePrompt] = {}  # open prompts, by signature
        self._quiet: dict[str, float] = {}  # signature -> time before which no prompt opens

    def ask(self, signature: str, asker: Asker, kept: Kept, tried: Tried) -> bytearray:
        """Implements `upcall.daemon.secrets.Prompter.passphrase`."""
        until = asker.deadline - MARGIN if asker.patient() else 0.0
        joined: _PassphrasePrompt | None = None
        with self._change:
            while (secret := kept()) is None:
                if joined is not None and joined.over:
                    raise Refused("locked", why=f"the prompt for its passphrase: {joined.outcome}")
                if joined is None:
                    joined = self._prompts.get(signature) or self._open(signature, asker, tried)
                left = until - time.monotonic()
                if left <= 0:
                    raise Refused("prompting", why="its passphrase is asked for")
                self._change.wait(left)
            return secret

    def lock(self) -> None:
        """Withdraws every prompt."""
        with self._change:
            for prompt in self._prompts.values():
                prompt.withdrawn = prompt.over = True
                if prompt.turn is not None:
                    prompt.turn.withdraw()
            self._prompts.clear()
            self._quiet.clear()
            self._change.notify_all()

    def unlock(self) -> None:
        """Allows prompts again: a person has unlocked a key."""
        with self._change:
            self._quiet.clear()

    # --- one prompt ----------------------------------------------------------------------------------------

    def _open(self, signature: str, asker: Asker, tried: Tried) -> _PassphrasePrompt:
        """Opens a prompt in a thread of its own. The caller holds the lock."""
        now = time.monotonic()
        self._quiet = {key: until for key, until in self._quiet.items() if until > now}
        if signature in self._quiet:
            raise Refused("locked", why=f"its passphrase was asked for just now; {WAIT}")
        if not self._anybody():
            self._log("prompt-unavailable", key=signature, hint=f"{HINT}; or `upcall unlock`")
            raise Refused("locked", why=f"it needs its passphrase: {HINT}, or `upcall unlock`")
        if len(self._prompts) >= MAX_OPEN:
            raise Refused("busy")
        opened = _PassphrasePrompt()
        thread = threading.Thread(
            target=self._converse, args=(signature, opened, asker, tried), name="prompt", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # no more threads
            raise Refused("busy") from None
        self._prompts[signature] = opened
        return opened

    def _converse(self, signature: str, prompt: _PassphrasePrompt, asker: Asker, tried: Tried) -> None:
        """Runs a prompt, in a thread of its own."""
        outcome = "withdrawn"
        try:
            who = describe(asker.service, asker.requester)  # before waiting: the requester may end meanwhile
            key = f"Key: {plain(_name_of(signature))}"
            with self._person:
                for wrong in range(self._settings.tries):
                    details = (key, *who, *_warning(wrong, self._settings.tries))
                    outcome = self._once(signature, prompt, Question(_WORDS, details, "Passphrase"), tried)
                    if outcome != "wrong":
                        break
        except OSError as error:  # no more descriptors
            outcome = f"{error.strerror}"
        finally:
            self._log("prompt-ended", key=signature, outcome=outcome)
            self._end(signature, prompt, outcome)

    def _once(self, signature: str, prompt: _PassphrasePrompt, question: Question, tried: Tried) -> str:
        """Asks once. Returns "answered" if the passphrase opens the key, "wrong" if not, otherwise the outcome."""
        with self._change:
            if prompt.withdrawn:
                return "withdrawn"
            turn = prompt.turn = Turn(self._settings.prompt_time)
        try:
            secret, outcome = self._ask_person(question, turn, key=signature)
        finally:
            with self._change:
                prompt.turn = None
                turn.close()
        if secret is None:
            return outcome
        try:
            return "answered" if tried(secret) else "wrong"
        except Refused as refused:
            return refused.reason
        finally:
            secret[:] = bytes(len(secret))

    def _end(self, signature: str, prompt: _PassphrasePrompt, outcome: str) -> None:
        with self._change:
            prompt.over, prompt.outcome = True, outcome
            if self._prompts.get(signature) is prompt:
                del self._prompts[signature]
                if outcome in _QUIETENING:
                    self._quiet[signature] = time.monotonic() + self._settings.quiet
            self._change.notify_all()


def _warning(wrong: int, tries: int) -> tuple[str, ...]:
    if not wrong:
        return ()
    left = tries - wrong
    return (f"That does not open it. You are asked {left} more time{'s' if left > 1 else ''}.",)


def _name_of(signature: str) -> str:
    """Returns the key's name in the user's key store with the signature; only the signature if it is not there."""
    from upcall.keys.store import KeyStore

    store = KeyStore()
    with contextlib.suppress(OSError):
        for name in store.names():
            with contextlib.suppress(UpcallError, OSError):
                if store.load(name).signature == signature:
                    return f"{name} ({signature})"
    return signature

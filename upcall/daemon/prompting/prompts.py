"""Implements the daemon's `Prompter`: a prompt stays open after the request that caused it has timed out."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Sequence

from upcall.core.errors import Refused
from upcall.daemon.prompting.agent import Agent
from upcall.daemon.prompting.passphrases import Passphrases
from upcall.daemon.prompting.pins import Pin
from upcall.daemon.prompting.question import Cancelled, Question, Turn, Unanswered, Unavailable, Way, Withdrawn
from upcall.daemon.prompting.requester import describe, plain
from upcall.daemon.prompting.settings import HINT, LOCKED_MEANWHILE, MARGIN, MAX_OPEN, WAIT, PromptSettings
from upcall.daemon.secrets import Asker
from upcall.process.log import EventLog

MARGIN_OF_TRIAL = 1.0  # the same while another request tries the PIN, which takes a token at most that long
TOUCH_EVERY, TOUCH_SHOWN = 10.0, 15.0  # seconds
MAX_TOKENS = 64


class _Prompt:
    """An open prompt. After its end, `failed` tells whether it gave no PIN, and `outcome` how it ended."""

    __slots__ = ("failed", "outcome", "turn", "withdrawn")

    def __init__(self) -> None:
        self.outcome = "withdrawn"
        self.turn: Turn | None = None  # while it is shown
        self.withdrawn = self.failed = False


class _Token:
    """The state of one token: its PIN and its open prompt."""

    __slots__ = ("name", "pin", "prompt", "quiet_until", "timer", "told_until", "waiting")

    def __init__(self, name: str, settings: PromptSettings) -> None:
        self.name = plain(name)
        self.pin = Pin(settings.wrong, settings.pin_time)
        self.prompt: _Prompt | None = None
        self.quiet_until = self.told_until = 0.0
        self.timer: threading.Timer | None = None
        self.waiting = 0


class Prompts:
    """Implements `upcall.daemon.secrets.Prompter`. Thread-safe. `ways`: methods of prompting, tried in order.
    `passphrases`: the prompts for keys; this class itself prompts for tokens."""

    def __init__(
        self, ways: Sequence[Way], settings: PromptSettings, log: EventLog, agent: Agent | None = None
    ) -> None:
        """`agent`: the method to which terminals attach; None: terminals are refused."""
        self._ways, self._settings, self._log, self._agent = ways, settings, log, agent
        self._change = threading.Condition()
        self._tokens: dict[str, _Token] = {}
        self._person = threading.Lock()  # held while a prompt is shown
        self.passphrases = Passphrases(self.ask, self.anybody, self._person, settings, log)

    # --- for modules ---------------------------------------------------------------------------------------

    def pin(self, token: str, prompt: str, asker: Asker, /) -> bytearray:
        """Returns the PIN; waits for a prompt until the request's deadline. Refused: "prompting" if it is still open
        then, "locked" if no prompt is possible or the person cancels, "pin-refused" after too many wrong PINs."""
        me, joined = threading.get_ident(), None
        until = asker.deadline - MARGIN if asker.patient() else 0.0
        with self._change:
            if asker.locked():
                raise Refused("locked", why=LOCKED_MEANWHILE)
            state = self._token(token)
            while (secret := state.pin.take(me, time.monotonic())) is None:
                if state.pin.worn_out:
                    why = f"{_wrong_pins(state.pin.failures)} for the token {state.name}"
                    raise Refused("pin-refused", why=why)
                tried = state.pin.tried_until
                if tried is not None:
                    self._wait(state, asker.deadline - MARGIN_OF_TRIAL, tried)
                elif joined is not None and joined.failed:
                    raise Refused("locked", why=f"the prompt for the PIN of the token {state.name}: {joined.outcome}")
                else:
                    if state.prompt is not None and state.prompt is not joined:
                        self._log("prompt-joined", token=state.name)
                    joined = state.prompt or self._open(state, prompt, asker)
                    self._wait(state, until, until)
            return secret

    def _wait(self, state: _Token, until: float, wake: float) -> None:
        """Waits for a change, at most until `wake`. Refused("prompting") after `until`. The caller holds the lock."""
        now = time.monotonic()
        if now >= until:
            raise Refused("prompting", why=f"the PIN of the token {state.name} is asked for")
        state.waiting += 1
        self._change.wait(max(0.0, min(until, wake) - now))
        state.waiting -= 1

    def verdict(self, token: str, good: bool, /) -> None:
        with self._change:
            state = self._token(token)
            state.pin.verdict(threading.get_ident(), good, time.monotonic(), bool(state.waiting))
            if state.pin.worn_out:
                self._log("pin-refused", token=state.name, hint="`upcall key unlock` lets you try again")
            self._changed(state)

    def over(self) -> None:
        """Ends the calling thread's request. A PIN that it got without a verdict counts as wrong."""
        with self._change:
            for state in self._tokens.values():
                state.pin.ended(threading.get_ident())
                self._changed(state)

    def touch(self, token: str, prompt: str, asker: Asker, /) -> None:
        with self._change:
            state, now = self._token(token), time.monotonic()
            if now < state.told_until:
                return
            state.told_until = now + TOUCH_EVERY
        threading.Thread(target=self._notify, args=(state, prompt, asker), name="touch", daemon=True).start()

    # --- for the user's commands ---------------------------------------------------------------------------

    def lock(self) -> None:
        """Wipes all PINs and withdraws all prompts."""
        self.passphrases.lock()
        with self._change:
            for state in self._tokens.values():
                state.pin.forget()
                state.pin.reset()
                state.quiet_until = 0.0
                prompt, state.prompt = state.prompt, None
                if prompt is not None:
                    prompt.withdrawn = prompt.failed = True
                    if prompt.turn is not None:
                        prompt.turn.withdraw()
                self._changed(state)

    def unlock(self) -> None:
        """Allows prompts again, also after wrong PINs: a person has unlocked a key."""
        self.passphrases.unlock()
        with self._change:
            for state in self._tokens.values():
                state.pin.reset()
                state.quiet_until = 0.0

    def attach(self, connection: socket.socket, welcome: bytes, /) -> None:
        """Attaches a terminal, which then answers prompts. Refused("no-service") without an agent."""
        if self._agent is None:
            raise Refused("no-service", why="the daemon was started with --ask, and without agent in it")
        self._agent.attach(connection, welcome)

    # --- one prompt ----------------------------------------------------------------------------------------

    def _token(self, name: str) -> _Token:
        """Returns the state of a token. The caller holds the lock."""
        state = self._tokens.get(name)
        if state is None:
            if len(self._tokens) >= MAX_TOKENS:
                self._tokens = {
                    key: one
                    for key, one in self._tokens.items()
                    if one.prompt is not None or one.waiting or not one.pin.idle
                }
            if len(self._tokens) >= MAX_TOKENS:
                raise Refused("busy")
            state = self._tokens[name] = _Token(name, self._settings)
        return state

    def _changed(self, state: _Token) -> None:
        """Wakes waiting threads, and sets a timer that wipes the PIN when it expires. The caller holds the lock."""
        self._change.notify_all()
        if state.timer is not None:
            state.timer.cancel()
            state.timer = None
        if state.pin.due is not None:
            state.timer = threading.Timer(max(0.0, state.pin.due - time.monotonic()), self._expire, (state,))
            state.timer.daemon = True
            state.timer.start()

    def _expire(self, state: _Token) -> None:
        with self._change:
            state.pin.expire(time.monotonic())
            self._changed(state)

    def _open(self, state: _Token, prompt: str, asker: Asker) -> _Prompt:
        """Opens a prompt in a thread of its own. The caller holds the lock."""
        if time.monotonic() < state.quiet_until:
            raise Refused("locked", why=f"the PIN of the token {state.name} was asked for just now; {WAIT}")
        if not self.anybody():
            self._log("prompt-unavailable", token=state.name, hint=HINT)
            raise Refused("locked", why=f"the token {state.name} needs its PIN: {HINT}")
        if sum(one.prompt is not None for one in self._tokens.values()) >= MAX_OPEN:
            raise Refused("busy")
        opened = _Prompt()
        thread = threading.Thread(
            target=self._converse, args=(state, opened, prompt, asker), name="prompt", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # no more threads
            raise Refused("busy") from None
        state.prompt = opened
        return opened

    def _converse(self, state: _Token, prompt: _Prompt, words: str, asker: Asker) -> None:
        """Runs a prompt, in a thread of its own."""
        secret, outcome = None, "withdrawn"
        try:
            who = describe(asker.service, asker.requester)  # before waiting: the requester may end meanwhile
            with self._person:
                with self._change:
                    details = (f"Token: {state.name}", *who, *self._warnings(state.pin))
                    if not prompt.withdrawn:
                        prompt.turn = Turn(self._settings.prompt_time)
                if prompt.turn is not None:
                    secret, outcome = self.ask(Question(plain(words), details), prompt.turn, token=state.name)
        except OSError as error:  # no more descriptors
            outcome = f"{error.strerror}"
        self._log("prompt-ended", token=state.name, outcome=outcome)
        self._end(state, prompt, secret, outcome)

    def _end(self, state: _Token, prompt: _Prompt, secret: bytearray | None, outcome: str) -> None:
        with self._change:
            if prompt.turn is not None:
                prompt.turn.close()
                prompt.turn = None
            if secret is not None and not prompt.withdrawn:
                state.pin.put(secret, time.monotonic())
            else:
                prompt.failed, prompt.outcome = True, outcome
            if state.prompt is prompt:
                state.prompt = None
                if outcome in ("cancelled", "unanswered"):
                    state.quiet_until = time.monotonic() + self._settings.quiet
            self._changed(state)
        if secret is not None:
            secret[:] = bytes(len(secret))

    def _warnings(self, pin: Pin) -> tuple[str, ...]:
        if not pin.failures:
            return ()
        wrong = f"{_wrong_pins(pin.failures)} so far"
        if pin.failures >= self._settings.wrong:
            return (f"{wrong}: another one may lock the token!",)
        return (f"{wrong}: you are asked {pin.left} more time{'s' if pin.left > 1 else ''}.",)

    def anybody(self) -> bool:
        """Returns whether any method may reach a person."""
        return any(way.available() for way in self._ways)

    def ask(self, question: Question, turn: Turn, **what: object) -> tuple[bytearray | None, str]:
        """Asks by the first method that is available. Returns (input, outcome); the input is None unless the outcome
        is "answered". `what`: fields for the log."""
        for way in self._ways:
            try:
                if not way.available():
                    continue
                self._log("prompt-opened", **what, way=way.name)
                return way.ask(question, turn), "answered"
            except (Cancelled, Unanswered, Withdrawn) as error:
                return None, type(error).__name__.lower()
            except Unavailable as error:
                self._log("prompt-failed", way=way.name, why=plain(str(error)))
            except Exception as error:  # noqa: BLE001 - if one method fails, the next one is tried
                self._log("prompt-failed", way=way.name, why=type(error).__name__)  # its text may contain the PIN
        return None, "nobody"

    def _notify(self, state: _Token, prompt: str, asker: Asker) -> None:
        """Shows one notice, in a thread of its own, so that the module does not wait for it."""
        who = describe(asker.service, asker.requester)
        question = Question(plain(prompt), (f"Token: {state.name}", *who))
        turn = Turn(TOUCH_SHOWN)
        try:
            for way in self._ways:
                if way.available() and way.notify(question, turn):
                    return
        except (Unavailable, Unanswered, OSError):
            pass
        finally:
            turn.close()
        self._log("touch-requested", token=state.name, prompt=question.prompt)


def _wrong_pins(count: int) -> str:
    return f"{count} wrong PIN{'s' if count > 1 else ''}"

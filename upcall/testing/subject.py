"""Describes the subject of the contract's checks: a key of the module under test, and how to open it.

Nothing here needs pytest: `upcall plugin check` makes the same checks as the class in `upcall.testing.contract`.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Self

from upcall.core.errors import ModuleFailed, PeerError, Refused, UpcallError, UsageError
from upcall.keymodule import Closable, Enrolled, KeyHandle, KeyMaker, KeyModule, Limits, Making, Secrets
from upcall.keys.enrolment import chosen
from upcall.testing.secrets import GivenSecrets

PASSPHRASE = b"a throw-away passphrase"
PIN = b"141421"
PATIENCE = 60.0  # seconds for one check; RSA-4096 on a slow machine needs ten

Errors = tuple[type[BaseException], ...]
FAILED: Errors = (ModuleFailed,)
CLEAN: Errors = (ModuleFailed, PeerError, Refused)  # what a module may raise when it is asked


class ContractBroken(AssertionError):
    """The module does not keep the contract; the text says how, for its author."""


class NotApplicable(Exception):
    """The check asks for something that this key or module does not have; the text says what."""


class Made(NamedTuple):
    """A key of the module under test."""

    module: KeyModule  # what opens it
    signature: str
    blob: bytes
    passphrase: bytes = b""  # empty if it has none
    file: Path | None = None  # None if it is in no file
    pin: bytes = b""  # of its token; empty if none is asked for
    maker: KeyMaker | None = None  # what made it; None if the checks cannot make another like it
    values: Mapping[str, str] = {}  # the parameters that it was made with
    spec: str = ""  # "package:attribute" of the module, by which a process of its own finds it

    def told(self) -> GivenSecrets:
        """What a person would tell who knows everything."""
        return GivenSecrets(self.passphrase or None, pin=self.pin or None)


def make_key(
    maker: KeyMaker,
    opener: KeyModule,
    folder: Path,
    values: Mapping[str, str] | None = None,
    passphrase: bytes = PASSPHRASE,
    pin: bytes = PIN,
    spec: str = "",
) -> Made:
    """A new key in `folder`, made with the module's own `generate`. `values`: of parameters without a default."""
    filled = chosen(maker.parameters, values or {})
    path = folder / f"key{maker.suffix}"
    word = passphrase if maker.takes_passphrase else b""
    enrolled = generate(maker, path, filled, word, pin)
    file = path if maker.suffix and path.exists() else None
    return Made(opener, enrolled.signature, enrolled.blob, word, file, pin, maker, filled, spec)


def generate(maker: KeyMaker, path: Path, values: Mapping[str, str], passphrase: bytes, pin: bytes) -> Enrolled:
    """As `upcall key generate` asks for it."""
    word, told = bytearray(passphrase), GivenSecrets(passphrase or None, pin=pin or None)
    return maker.generate(Making(path, values, word, "ask" if word else "none", Limits(), told))


@contextlib.contextmanager
def moved_away(made: Made) -> Iterator[None]:
    """The usual way of taking a key away: its file is not there for a while."""
    if made.file is None:
        raise NotApplicable("the key is in no file; how its token is taken out only you know: see token_taken_out")
    away = made.file.with_name(made.file.name + ".away")
    made.file.rename(away)
    try:
        yield
    finally:
        away.rename(made.file)


class Subject:
    """One key, for one check. What is opened here is closed at the end."""

    def __init__(
        self,
        made: Made,
        folder: Path,
        taken_out: Callable[[Made], AbstractContextManager[None]] = moved_away,
        patience: float = PATIENCE,
        prompt: float = 2.5,
    ) -> None:
        """`folder`: empty, for files. `patience`: seconds that the check may take. `prompt`: seconds in which a
        request must be answered, the opening of its key included: what the broker waits for."""
        self.made, self.folder, self.patience, self.prompt = made, folder, patience, prompt
        self._taken_out = taken_out
        self._opened = contextlib.ExitStack()

    def open(
        self, secrets: Secrets | None = None, signature: str | None = None, blob: bytes | None = None
    ) -> KeyHandle:
        """The key, opened as the daemon does it; something else as told."""
        made, ours = self.made, os.getpid()
        try:
            handle = made.module.open(
                made.signature if signature is None else signature,
                made.blob if blob is None else blob,
                made.told() if secrets is None else secrets,
            )
        finally:
            if os.getpid() != ours:
                os._exit(0)  # the module has forked, and this is the copy, which must not make the check once more
        if isinstance(handle, Closable):
            self._opened.callback(_close, handle)
        return handle

    def away(self) -> AbstractContextManager[None]:
        """Without the key's file or token."""
        return self._taken_out(self.made)

    def another(self) -> Made:
        """Another key, made in the same way. NotApplicable."""
        maker = self.maker()
        try:
            return make_key(
                maker, self.made.module, self.folder, self.made.values, self.made.passphrase, self.made.pin
            )
        except (UsageError, ModuleFailed, Refused) as error:
            raise NotApplicable(f"no second key can be made like the first: {error}") from None

    def maker(self) -> KeyMaker:
        if self.made.maker is None:
            raise NotApplicable("how to make another key was not said")
        return self.made.maker

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()


def _close(handle: Closable) -> None:
    with contextlib.suppress(Exception):  # one check looks at how it closes; the others are about something else
        handle.close()


Check = Callable[[Subject], None]


def title(check: Check) -> str:
    """The check's name as a sentence."""
    return check.__name__.replace("_", " ")


def run_check(check: Check, subject: Subject) -> None:
    """Makes one check, for as long as the subject is patient. ContractBroken, NotApplicable.

    In a thread of its own, which is left behind if the module hangs.
    """
    ended: list[BaseException | None] = []
    ours = os.getpid()

    def work() -> None:
        error: BaseException | None = None
        try:
            with subject:
                check(subject)
        except BaseException as caught:  # noqa: BLE001 - whatever it is, it is the outcome
            error = caught
        if os.getpid() != ours:
            os._exit(0)  # as in Subject.open
        ended.append(error)

    thread = threading.Thread(target=work, name=check.__name__, daemon=True)
    thread.start()
    thread.join(subject.patience)
    if not ended:
        raise ContractBroken(f"it hangs: nothing was heard for {subject.patience:g} s")
    if isinstance(ended[0], ContractBroken | NotApplicable):
        raise ended[0]
    if ended[0] is not None:
        raise ContractBroken(f"raised {described(ended[0])}") from ended[0]


# --- words for checks ----------------------------------------------------------------------------------------


def described(error: BaseException) -> str:
    """Type, text and place; the text of what is not upcall's own is left out, for it may hold anything."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else ""
    text = f": {error}" if isinstance(error, UpcallError) else ""
    return f"{type(error).__name__}{text}{where}"


def expect(true: object, why: str) -> None:
    """ContractBroken unless it is true."""
    if not true:
        raise ContractBroken(why)


def refused(what: str, allowed: Errors, call: Callable[..., object], *arguments: object) -> BaseException:
    """The error with which the call is refused, one of `allowed`; ContractBroken for any other, or none."""
    error = failure(what, allowed, call, *arguments)
    if error is None:
        raise ContractBroken(f"{what}: was not refused")
    return error


def failure(what: str, allowed: Errors, call: Callable[..., object], *arguments: object) -> BaseException | None:
    """None if it does what it is asked, or the error with which it refuses; ContractBroken for any other error."""
    try:
        call(*arguments)
    except allowed as error:
        return error
    except BaseException as error:
        names = " or ".join(kind.__name__ for kind in allowed)
        raise ContractBroken(f"{what}: {names} was expected, not {described(error)}") from error
    return None


def wrapped_by(key: KeyHandle, clear: bytes) -> bytes:
    """What it makes of the key; ContractBroken if that is no bytes."""
    wrapped: Any = key.wrap(clear)
    expect(isinstance(wrapped, bytes), f"wrap gave a {type(wrapped).__name__} for {len(clear)} bytes, not bytes")
    return bytes(wrapped)

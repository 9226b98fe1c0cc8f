"""Describes the subject of the contract's checks: a key of the module under test, and how to open it.

Does not need pytest: `upcall plugin check` runs the same checks as the class in `upcall.testing.contract`.
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
PATIENCE = 60.0  # seconds, the time-out of one check; RSA-4096 needs ten on a slow machine

Errors = tuple[type[BaseException], ...]
FAILED: Errors = (ModuleFailed,)
CLEAN: Errors = (ModuleFailed, PeerError, Refused)  # exceptions that a module may raise for a request


class ContractBroken(AssertionError):
    """The module violates the contract. The text describes how, for its author."""


class NotApplicable(Exception):
    """The check needs a property that this key or module does not have. The text names it."""


class Made(NamedTuple):
    """A key of the module under test."""

    module: KeyModule  # opens it
    signature: str
    blob: bytes
    passphrase: bytes = b""  # empty without one
    file: Path | None = None  # None if the key is not in a file
    pin: bytes = b""  # of its token; empty without one
    maker: KeyMaker | None = None  # made it; None if the checks cannot make another key
    values: Mapping[str, str] = {}  # of the parameters that it was made with
    spec: str = ""  # "package:attribute" of the module, for checks in a child process; "": these are skipped

    def told(self) -> GivenSecrets:
        """Returns the key's secrets, for opening it."""
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
    """Makes a key in `folder` by the module's `generate`. `values`: of parameters without a default, by name.
    `opener`: the module that opens it. ModuleFailed, UsageError."""
    filled = chosen(maker.parameters, values or {})
    path = folder / f"key{maker.suffix}"
    word = passphrase if maker.takes_passphrase else b""
    enrolled = generate(maker, path, filled, word, pin)
    file = path if maker.suffix and path.exists() else None
    return Made(opener, enrolled.signature, enrolled.blob, word, file, pin, maker, filled, spec)


def generate(maker: KeyMaker, path: Path, values: Mapping[str, str], passphrase: bytes, pin: bytes) -> Enrolled:
    """Calls the module's `generate` as `upcall key generate` does."""
    word, told = bytearray(passphrase), GivenSecrets(passphrase or None, pin=pin or None)
    return maker.generate(Making(path, values, word, "ask" if word else "none", Limits(), told))


@contextlib.contextmanager
def moved_away(made: Made) -> Iterator[None]:
    """A context in which the key's file is renamed. NotApplicable if the key is not in a file."""
    if made.file is None:
        raise NotApplicable("the key is in no file; how its token is taken out only you know: see token_taken_out")
    away = made.file.with_name(made.file.name + ".away")
    made.file.rename(away)
    try:
        yield
    finally:
        away.rename(made.file)


class Subject:
    """One key, for one check. A context manager: its end closes the opened keys."""

    def __init__(
        self,
        made: Made,
        folder: Path,
        taken_out: Callable[[Made], AbstractContextManager[None]] = moved_away,
        patience: float = PATIENCE,
        prompt: float = 2.5,
    ) -> None:
        """`folder`: an empty folder for files. `patience`: seconds, the time-out of the check. `prompt`: seconds in
        which a request must be answered, including the opening of its key: the broker's time-out."""
        self.made, self.folder, self.patience, self.prompt = made, folder, patience, prompt
        self._taken_out = taken_out
        self._opened = contextlib.ExitStack()

    def open(
        self, secrets: Secrets | None = None, signature: str | None = None, blob: bytes | None = None
    ) -> KeyHandle:
        """Opens the key as the daemon does, or with other arguments."""
        made, ours = self.made, os.getpid()
        try:
            handle = made.module.open(
                made.signature if signature is None else signature,
                made.blob if blob is None else blob,
                made.told() if secrets is None else secrets,
            )
        finally:
            if os.getpid() != ours:
                os._exit(0)  # a fork by the module: the child must not run the check again
        if isinstance(handle, Closable):
            self._opened.callback(_close, handle)
        return handle

    def away(self) -> AbstractContextManager[None]:
        """Returns a context in which the key's file or token is not there."""
        return self._taken_out(self.made)

    def another(self) -> Made:
        """Makes another key in the same way. NotApplicable."""
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
    with contextlib.suppress(Exception):  # another check tests closing
        handle.close()


Check = Callable[[Subject], None]


def title(check: Check) -> str:
    """Returns the check's name as a sentence."""
    return check.__name__.replace("_", " ")


def run_check(check: Check, subject: Subject) -> None:
    """Runs one check of a key module, with the subject's time-out. ContractBroken, also after the time-out;
    NotApplicable."""

    def work() -> None:
        with subject:
            check(subject)

    in_time(check.__name__, work, subject.patience)


def in_time(name: str, run: Callable[[], None], patience: float) -> None:
    """Runs a check that is called `name`. ContractBroken if it raises anything but that and NotApplicable, or takes
    longer than `patience` seconds.

    Runs it in a thread of its own, which is left behind if the plugin hangs.
    """
    ended: list[BaseException | None] = []
    ours = os.getpid()

    def work() -> None:
        error: BaseException | None = None
        try:
            run()
        except BaseException as caught:  # noqa: BLE001 - reported by the calling thread
            error = caught
        if os.getpid() != ours:
            os._exit(0)  # as in Subject.open
        ended.append(error)

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    thread.join(patience)
    if not ended:
        raise ContractBroken(f"it hangs: nothing was heard for {patience:g} s")
    if isinstance(ended[0], ContractBroken | NotApplicable):
        raise ended[0]
    if ended[0] is not None:
        raise ContractBroken(f"raised {described(ended[0])}") from ended[0]


# --- words for checks ----------------------------------------------------------------------------------------


def described(error: BaseException) -> str:
    """Describes an exception by type, text and place. Leaves out texts of foreign exceptions: they may contain
    secrets."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else ""
    text = f": {error}" if isinstance(error, UpcallError) else ""
    return f"{type(error).__name__}{text}{where}"


def expect(true: object, why: str) -> None:
    """ContractBroken, with the text `why`, unless `true` is truthy."""
    if not true:
        raise ContractBroken(why)


def refused(what: str, allowed: Errors, call: Callable[..., object], *arguments: object) -> BaseException:
    """Returns the exception of the call, which must be one of `allowed`. ContractBroken for another one, or none.
    `what`: the call, for the text."""
    error = failure(what, allowed, call, *arguments)
    if error is None:
        raise ContractBroken(f"{what}: was not refused")
    return error


def failure(what: str, allowed: Errors, call: Callable[..., object], *arguments: object) -> BaseException | None:
    """Returns None if the call succeeds, otherwise its exception, which must be one of `allowed`. ContractBroken for
    another one."""
    try:
        call(*arguments)
    except allowed as error:
        return error
    except BaseException as error:
        names = " or ".join(kind.__name__ for kind in allowed)
        raise ContractBroken(f"{what}: {names} was expected, not {described(error)}") from error
    return None


def wrapped_by(key: KeyHandle, clear: bytes) -> bytes:
    """Wraps a key. Returns the result. ContractBroken if it is not bytes."""
    wrapped: Any = key.wrap(clear)
    expect(isinstance(wrapped, bytes), f"wrap gave a {type(wrapped).__name__} for {len(clear)} bytes, not bytes")
    return bytes(wrapped)

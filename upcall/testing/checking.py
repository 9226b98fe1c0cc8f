"""Runs the contract's checks on an installed plugin in a child process: a crash of the plugin fails one check only.

`check_plugin` starts `python -m upcall.testing.checking`, which reports by lines of JSON on a pipe. If a plugin
crashes or stops the process, the running check fails, and another process runs the remaining ones.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from upcall.core.errors import UpcallError, UsageError
from upcall.core.messages import Requester
from upcall.daemon.isolation.module import IsolatedModule
from upcall.handler import GROUP as HANDLERS
from upcall.keymodule import GROUP as KEY_MODULES
from upcall.keymodule import KeyImporter, KeyMaker, KeyModule, Limits, Making
from upcall.keys.enrolment import chosen, take_in
from upcall.keys.plugins import load, load_handler, load_sink
from upcall.process import start_python as startpython
from upcall.sink import GROUP as SINKS
from upcall.testing.checks import CHECKS
from upcall.testing.checks.handlers import HANDLER_CHECKS
from upcall.testing.checks.sinks import SINK_CHECKS, SinkSubject
from upcall.testing.secrets import GivenSecrets
from upcall.testing.subject import (
    PASSPHRASE,
    PATIENCE,
    PIN,
    ContractBroken,
    Made,
    NotApplicable,
    Subject,
    described,
    in_time,
    make_key,
    run_check,
)
from upcall.wire.envelope import Envelope

T = TypeVar("T")
KEPT, BROKEN, LEFT_OUT = "kept", "broken", "left out"
LOADING, MAKING = "it_can_be_loaded", "a_key_can_be_made"
_GRACE = 2.0  # seconds after a check's time-out in which the process may report it itself


class Order(NamedTuple):
    """The plugin to check; of a key module how to make its key, of a handler what to ask it, of a sink its
    settings."""

    alias: str  # of a handler: its service
    spec: str
    isolated: bool = False  # run it in a process of its own, as the daemon does with isolated modules
    values: Mapping[str, str] = {}  # of parameters, by name
    file: str = ""  # path of a key file to import, if `importing`
    importing: bool = False
    passphrase: str = PASSPHRASE.decode()
    pin: str = PIN.decode()
    patience: float = PATIENCE
    group: str = KEY_MODULES  # of entry points
    request: str = ""  # the body of a valid request to a handler, in hexadecimal
    settings: Mapping[str, Any] = {}  # of a sink


class Verdict(NamedTuple):
    """The result of one check. `why`: the reason, for the plugin's author; "" if the check passes. `trace`: the
    traceback of the exception that broke it, or ""."""

    check: str
    outcome: str  # KEPT, BROKEN, LEFT_OUT
    why: str
    trace: str


def check_plugin(order: Order) -> Iterator[Verdict]:
    """Runs all checks; yields each verdict when it is reached. Ends early if the plugin cannot be loaded or makes no
    key.

    Each check takes at most `order.patience` seconds, and a little more if the plugin hangs its whole process.
    """
    left = [LOADING, *_NAMES[order.group]]
    while left:
        for verdict in _one_process(order, left):
            left.remove(verdict.check)
            yield verdict
            if verdict.outcome == BROKEN and verdict.check in (LOADING, MAKING):
                return


_NAMES: Mapping[str, tuple[str, ...]] = {
    KEY_MODULES: (MAKING, *(check.__name__ for check in CHECKS)),
    HANDLERS: tuple(check.__name__ for check in HANDLER_CHECKS),
    SINKS: tuple(check.__name__ for check in SINK_CHECKS),
}


def _one_process(order: Order, left: Sequence[str]) -> Iterator[Verdict]:
    """Yields the verdicts of one process: at least one, because an early end fails the check that was running."""
    reader, writer = os.pipe()
    told = os.memfd_create("order")  # passed as stdin, not in argv: it contains secrets
    os.write(told, json.dumps([order._asdict(), list(left)]).encode())
    os.lseek(told, 0, os.SEEK_SET)
    with tempfile.TemporaryDirectory(prefix="upcall-check-") as folder:
        arguments = startpython.command("upcall.testing.checking", str(writer), folder)
        null = subprocess.DEVNULL  # discards what a plugin prints
        try:
            process = subprocess.Popen(
                arguments, stdin=told, stdout=null, stderr=null, pass_fds=[writer], start_new_session=True
            )
        finally:
            os.close(writer)
            os.close(told)
        try:
            yield from _heard(process, reader, order.patience + _GRACE, left)
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # with its children: the process leads a session
            process.wait()
            os.close(reader)


def _heard(process: subprocess.Popen[bytes], fd: int, patience: float, left: Sequence[str]) -> Iterator[Verdict]:
    waiting, buffer = list(left), b""
    while waiting:
        deadline = time.monotonic() + patience
        while b"\n" not in buffer:
            if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                yield Verdict(waiting[0], BROKEN, f"it hangs with everything: not a word for {patience:g} s", "")
                return
            if not (chunk := os.read(fd, 65536)):
                yield Verdict(waiting[0], BROKEN, _ending(process), "")
                return
            buffer += chunk
        line, _, buffer = buffer.partition(b"\n")
        verdict = Verdict(*json.loads(line))
        waiting.remove(verdict.check)
        yield verdict


def _ending(process: subprocess.Popen[bytes]) -> str:
    """Describes how the process has ended, without reaping it: its pid must stay valid for killpg."""
    pidfd = os.pidfd_open(process.pid)
    try:
        ended = select.select([pidfd], [], [], _GRACE)[0]
        found = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    finally:
        os.close(pidfd)
    if not ended or found is None:
        return "it closed what was not its own: the pipe of this check"
    if found.si_code == os.CLD_EXITED:
        return f"it ended the process that had loaded it, with {found.si_status}"
    return f"the process that had loaded it was killed by {signal.Signals(found.si_status).name}"


# --- the process ---------------------------------------------------------------------------------------------


class _Sayer:
    """Writes verdicts to the pipe of `check_plugin`."""

    def __init__(self, out: int, left: Sequence[str]) -> None:
        self._out, self.left = out, list(left)

    def __call__(self, check: str, outcome: str, why: str = "", trace: str = "") -> None:
        name = check if check in self.left else self.left[0]  # a check that had passed fails after its end
        self.left.remove(name)
        os.write(self._out, json.dumps([name, outcome, why, trace]).encode() + b"\n")

    def attempt(self, check: str, work: Callable[[], T]) -> T:
        """Returns the result of `work`. If it raises, reports the check as broken and ends this process."""
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - plugins raise anything
            why = str(error) if isinstance(error, UpcallError) else f"raised {described(error)}"
            self(check, BROKEN, why, _trace(error))
            sys.exit(1)
        if check in self.left:
            self(check, KEPT)
        return result


def _trace(error: BaseException | None) -> str:
    return "" if error is None else "".join(traceback.format_exception(error))


def _serve(out: int, folder: Path) -> None:
    told, left = json.loads(sys.stdin.buffer.read())
    order, say = Order(**told), _Sayer(out, left)
    for name, run in _PREPARED[order.group](order, say, folder):
        if name not in say.left:
            continue
        try:
            run()
        except NotApplicable as error:
            say(name, LEFT_OUT, str(error))
        except ContractBroken as error:
            say(name, BROKEN, str(error), _trace(error.__cause__))
        else:
            say(name, KEPT)
    os._exit(0)  # without cleanup: a check that hangs leaves its thread behind


Prepared = Iterator[tuple[str, Callable[[], None]]]  # checks: the name, and a function that runs it


def _key_module(order: Order, say: _Sayer, folder: Path) -> Prepared:
    module = say.attempt(LOADING, lambda: _loaded(order))
    made = say.attempt(MAKING, lambda: _made(order, module, folder))
    for number, check in enumerate(CHECKS):
        files = folder / str(number)
        files.mkdir()
        yield check.__name__, partial(run_check, check, Subject(made, files, patience=order.patience))


def _handler(order: Order, say: _Sayer, _: Path) -> Prepared:
    handler = say.attempt(LOADING, lambda: load_handler(order.spec, order.alias))
    asking = Envelope(1, 0, order.alias, Requester(os.getuid(), os.getpid()), 0, bytes.fromhex(order.request))
    for check in HANDLER_CHECKS:
        yield check.__name__, partial(in_time, check.__name__, partial(check, handler, asking), order.patience)


def _sink(order: Order, say: _Sayer, _: Path) -> Prepared:
    module = say.attempt(LOADING, lambda: load_sink(order.spec, order.alias))
    subject = SinkSubject(module, order.settings, os.getuid())
    for check in SINK_CHECKS:
        yield check.__name__, partial(in_time, check.__name__, partial(check, subject), order.patience)


_PREPARED: Mapping[str, Callable[[Order, _Sayer, Path], Prepared]] = {
    KEY_MODULES: _key_module,
    HANDLERS: _handler,
    SINKS: _sink,
}


def _loaded(order: Order) -> KeyModule:
    module = load(order.spec)
    if module.name != order.alias:
        raise UsageError(f"its name is {module.name!r}, but its entry point is called {order.alias!r}")
    return module


def _made(order: Order, module: KeyModule, folder: Path) -> Made:
    opener: KeyModule = IsolatedModule(order.alias, order.spec) if order.isolated else module
    files = folder / "key"
    files.mkdir()
    word, pin = order.passphrase.encode(), order.pin.encode()
    if isinstance(module, KeyMaker) and not order.importing:
        return make_key(module, opener, files, order.values, word, pin, order.spec)
    if isinstance(module, KeyImporter):
        return _imported(order, module, opener)
    if order.values.keys() != {"signature", "blob"}:
        raise UsageError("it neither makes nor imports keys: name one with --param signature=... --param blob=HEX")
    blob = bytes.fromhex(order.values["blob"])
    return Made(opener, order.values["signature"], blob, b"", None, pin, None, {}, order.spec)


def _imported(order: Order, module: KeyImporter, opener: KeyModule) -> Made:
    """Imports an existing key. Does not pass its file to the checks: some would move it away."""
    told = GivenSecrets(order.passphrase.encode(), pin=order.pin.encode())
    values = chosen(module.import_parameters, order.values)
    taken = take_in(module, Making(Path(order.file), values, bytearray(), "ask", Limits(), told))
    word = order.passphrase.encode() if told.sources else b""
    return Made(opener, taken.signature, taken.blob, word, None, order.pin.encode(), None, {}, order.spec)


if __name__ == "__main__":
    _serve(int(sys.argv[1]), Path(sys.argv[2]))

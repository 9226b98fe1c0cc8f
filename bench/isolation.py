"""Compares a key module in a process of its own with the same module in the daemon's process."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from bench.noop import module as noop
from bench.packets import new_signature
from bench.rows import QUICK, Effort, Row, bounded, by_turns, compared, show
from bench.stage import BenchError, Stage, rss_mb
from upcall.core.errors import UpcallError, UsageError
from upcall.daemon.isolation.module import IsolatedModule
from upcall.keymodule import KeyHandle, KeyMaker, Limits, Making
from upcall.keys.plugins import Found, available, load
from upcall.testing.secrets import GivenSecrets

_ROOT = Path(__file__).resolve().parents[1]
_KEY = bytes(range(35))
_WARM_UP = 100
_PASSPHRASE = b"of a benchmark"


def rows(stage: Stage, effort: Effort) -> Iterator[Row]:
    # The child, like the daemon, does not import from the working directory.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    bare = stage.start([sys.executable, "-c", "import time; time.sleep(600)"]).pid
    isolated = IsolatedModule("noop", "bench.noop:module")
    try:
        yield from _round_trips(isolated, effort)
        yield from _memory(isolated, bare)
    finally:
        isolated.close()
        stage.end([bare])
    with contextlib.ExitStack() as stack:
        for alias, found in available().items():
            yield from _installed(stage.folder, stack, alias, found, effort)


def _round_trips(isolated: IsolatedModule, effort: Effort) -> Iterator[Row]:
    handle = isolated.open(new_signature(), b"", GivenSecrets())
    with _Echo() as echo:
        contenders: dict[str, Callable[[], float]] = {
            "isolated": partial(_us, partial(handle.wrap, _KEY), effort.messages),
            "inline": partial(_us, partial(noop.open("", b"", GivenSecrets()).wrap, _KEY), effort.messages),
            "pipe": partial(_us, echo.ask, effort.messages),
        }
        found = by_turns(contenders, effort.rounds)
    row = partial(compared, "isolated key modules", "round trip, no-op key module", "us", found["isolated"])
    yield row(found["inline"], "inline")
    yield row(found["pipe"], "multiprocessing.Pipe", note="the pipe's other end sends back what it was sent")


def _memory(isolated: IsolatedModule, bare: int) -> Iterator[Row]:
    pid = isolated.report()["pid"]
    if not isinstance(pid, int):
        raise BenchError("the isolated module has no process")
    row = partial(bounded, "isolated key modules", peer_is="bare interpreter")
    yield row("rss of its process", "MB", rss_mb(pid), at_most=25, peer=rss_mb(bare))
    yield row("of which shared with nobody", "MB", _private_mb(pid), at_most=15, peer=_private_mb(bare))


def _installed(folder: Path, stack: contextlib.ExitStack, alias: str, found: Found, effort: Effort) -> Iterator[Row]:
    """Measures wraps and unwraps per second of a module, if its requirements are installed."""
    module = load(found.spec)
    if not isinstance(module, KeyMaker):
        return
    passphrase = bytearray(_PASSPHRASE if module.takes_passphrase else b"")
    path, source = folder / f"{alias}{module.suffix}", "ask" if passphrase else "none"
    isolated = IsolatedModule(alias, found.spec)
    try:
        values = {one.name: one.default for one in module.parameters if one.default is not None}
        values |= _DEVICES[alias](folder, stack) if alias in _DEVICES else {}
        made = module.generate(Making(path, values, passphrase, source, Limits(), GivenSecrets(_PASSPHRASE)))
        inside = module.open(made.signature, made.blob, GivenSecrets(_PASSPHRASE))
        apart = isolated.open(made.signature, made.blob, GivenSecrets(_PASSPHRASE))
        yield from _verbs(f"{alias} ({made.description})", apart, inside, effort)
    except (UpcallError, KeyError, ImportError) as error:
        print(f"bench: isolation: {alias} is left out: {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        isolated.close()


def _token(folder: Path, _: contextlib.ExitStack) -> dict[str, str]:
    """Makes a SoftHSM token whose PIN is in a file. The child, too, finds it by the environment."""
    from upcall_pkcs11.softhsm import SoftHsm, missing

    if missing():
        raise UsageError(missing())
    tokens = SoftHsm(folder)
    tokens.add("bench")
    os.environ["SOFTHSM2_CONF"] = str(tokens.config)
    return {"uri": tokens.uri("bench", with_pin=True), "type": "rsa", "bits": "2048"}


def _tpm(folder: Path, stack: contextlib.ExitStack) -> dict[str, str]:
    """Starts a software TPM."""
    from upcall_tpm2.swtpm import SoftwareTpm, missing

    if missing():
        raise UsageError(missing())
    tpm = SoftwareTpm(folder / "tpm")
    stack.callback(tpm.kill)
    return {"tcti": tpm.tcti}


# Functions that prepare a token or TPM, and return parameters for `generate`.
_DEVICES: dict[str, Callable[[Path, contextlib.ExitStack], dict[str, str]]] = {"pkcs11": _token, "tpm2": _tpm}


def _verbs(name: str, apart: KeyHandle, inside: KeyHandle, effort: Effort) -> Iterator[Row]:
    wrapped = inside.wrap(_KEY)
    for verb, data in (("wrap", _KEY), ("unwrap", wrapped)):
        contenders: dict[str, Callable[[], float]] = {
            which: partial(_per_second, partial(getattr(handle, verb), data), effort.seconds / 4)
            for which, handle in (("isolated", apart), ("inline", inside))
        }
        found = by_turns(contenders, effort.rounds)
        title = f"{name}, {verb}s, one thread"
        yield compared("isolated key modules", title, "/s", found["isolated"], found["inline"], "inline")


def _us(call: Callable[[], object], count: int) -> float:
    for _ in range(_WARM_UP):
        call()
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count * 1e6


def _per_second(call: Callable[[], object], seconds: float) -> float:
    call()
    start, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < seconds:
        call()
        count += 1
    return count / spent


def _private_mb(pid: int) -> float:
    """Returns the process's private memory in MB, which its end would free, from smaps_rollup (proc(5))."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


class _Echo:
    """The standard library's equivalent: a process at the other end of a multiprocessing pipe."""

    def __enter__(self) -> _Echo:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_echo, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        return self

    def ask(self) -> object:
        self._connection.send(("wrap", 1, _KEY))
        return self._connection.recv()

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join(5)


def _echo(connection: Connection) -> None:
    try:
        while True:
            connection.send(connection.recv())
    except EOFError:
        os._exit(0)


def main() -> None:
    with Stage() as stage:
        show(list(rows(stage, QUICK)))


if __name__ == "__main__":
    main()

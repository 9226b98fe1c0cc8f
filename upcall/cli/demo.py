"""`upcall demo`: demonstrates broker, daemon and key on any machine, without eCryptfs and without privileges."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from upcall.cli import output
from upcall.client import Client, NoBroker
from upcall.core.errors import Refused, UpcallError, error_words
from upcall.kernel import procfs
from upcall.observe.tables import Column, print_table, table_lines
from upcall.process import start_python as startpython

_PATIENCE = 20.0
_REQUESTERS = 2
_IN_HAND = 8  # requests that the daemon holds when it is killed


class Tally:
    """The results of the requesters. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.equal = self.different = 0
        self.latencies: list[float] = []
        self.refused: dict[str, int] = {}
        self.busy = 0.0  # seconds of measured traffic

    def trip(self, equal: bool, latencies: tuple[float, float]) -> None:
        with self._lock:
            self.equal += equal
            self.different += not equal
            self.latencies.extend(latencies)

    def refusal(self, reason: str) -> None:
        with self._lock:
            self.refused[reason] = self.refused.get(reason, 0) + 1

    def quantile(self, share: float) -> float:
        """Returns a quantile of the latencies of the last few thousand requests, in seconds."""
        with self._lock:
            recent = sorted(self.latencies[-4000:])
        return recent[int(len(recent) * share)] if recent else 0.0


@click.command("demo")
@click.option(
    "--keys",
    type=click.IntRange(10, 1_000_000),
    default=6000,
    show_default=True,
    help="How many keys to wrap and unwrap.",
)
@click.option(
    "--bits", type=click.Choice(["2048", "3072", "4096"]), default="3072", show_default=True, help="Of the RSA key."
)
def command(keys: int, bits: str) -> None:
    """Show the broker, a daemon and an RSA key at work, and what happens when the daemon is killed.

    It runs in a temporary folder, and leaves nothing behind. It needs no privileges and no eCryptfs.

    \b
    Exit codes: 0 every key came back equal, and every request that could not be served was refused; 70 otherwise.

    \b
    Examples:
      $ upcall demo
    """
    console = output.console()
    with tempfile.TemporaryDirectory(prefix="upcall-demo-") as folder, _Stage(Path(folder), console) as stage:
        stage.make_key(bits)
        tally = Tally()
        stage.traffic(keys * 2 // 3, tally, "wrapping and unwrapping random keys")
        stage.kill_the_daemon(tally)
        stage.traffic(keys - keys * 2 // 3, tally, "the same, with the new daemon")
        good = stage.summary(tally, keys)
    sys.exit(os.EX_OK if good else os.EX_SOFTWARE)


class _Stage(contextlib.AbstractContextManager["_Stage"]):
    """A broker and a daemon in a temporary folder."""

    def __init__(self, folder: Path, console: Console) -> None:
        self._folder, self._console = folder, console
        self._environment = os.environ | {
            "XDG_RUNTIME_DIR": str(folder / "run"),
            "XDG_DATA_HOME": str(folder / "data"),
        }
        for name in ("run", "data", "broker"):
            (folder / name).mkdir(mode=0o700)
        self._broker_folder = folder / "broker"
        self._log = (folder / "log").open("wb")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._signature = ""
        self._ending = threading.Event()

    def __enter__(self) -> _Stage:
        try:
            self._start("broker", "--no-ecryptfs")
            _wait(lambda: self._status() is not None, "the broker")
            self._say("broker started: it answers for every daemon")
            self._daemon = self._start_daemon()
            self._say(f"daemon started, registered by HELO for uid {os.getuid()}")
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, _type: object, error: object, _traceback: object) -> None:
        self._close()
        if isinstance(error, UpcallError):
            self._show_log()

    def _close(self) -> None:
        """Ends the processes, and removes the auth token; also after Ctrl-C, SIGTERM and SIGHUP, wherever that was."""
        self._ending.set()
        if (self._folder / "data" / "upcall" / "keys" / "demo.toml").exists():
            with contextlib.suppress(UpcallError, OSError, subprocess.TimeoutExpired):
                self._upcall("key", "remove", "demo", "--yes")
        for process in reversed(self._processes):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._log.close()

    # --- processes -----------------------------------------------------------------------------------------

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            startpython.command("upcall", *arguments, "--runtime", str(self._broker_folder)),
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C is for this process, which ends them in order
        )
        self._processes.append(process)
        return process

    def _start_daemon(self) -> subprocess.Popen[bytes]:
        process = self._start("daemon")
        _wait(lambda: process.pid in self._daemons(), "the daemon")
        return process

    def _upcall(self, *arguments: str) -> str:
        done = subprocess.run(
            startpython.command("upcall", *arguments),
            env=self._environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            raise UpcallError(f"upcall {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def _status(self) -> dict[str, Any] | None:
        try:
            with Client(self._broker_folder) as client:
                return client.status()
        except (NoBroker, TimeoutError):
            return None

    def _daemons(self) -> list[int]:
        status = self._status() or {"daemons": []}
        return [daemon["pid"] for daemon in status["daemons"]]

    # --- acts ----------------------------------------------------------------------------------------------

    def make_key(self, bits: str) -> None:
        """Makes a key with the passphrase in a private file, so that a restarted daemon can open it, too."""
        passphrase = self._folder / "passphrase"
        passphrase.touch(0o600)
        passphrase.write_text(secrets.token_hex(16))
        with self._console.status(f"making an RSA-{bits} key ..."):
            self._upcall("key", "generate", "demo", "--bits", bits, "--passphrase-file", str(passphrase))
            from upcall.keys.store import KeyStore

            self._signature = KeyStore(self._folder / "data" / "upcall" / "keys").load("demo").signature
        self._say(f"RSA-{bits} key made, its auth token {self._signature} is in the kernel's user keyring")

    def traffic(self, keys: int, tally: Tally, title: str) -> None:
        """Wraps and unwraps `keys` random keys, with a live view."""
        done = tally.equal + tally.different
        begun = time.monotonic()
        workers = [
            threading.Thread(target=self._requester, args=(keys // _REQUESTERS + (i < keys % _REQUESTERS), tally))
            for i in range(_REQUESTERS)
        ]
        progress = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        task = progress.add_task(title, total=keys)
        for worker in workers:
            worker.start()
        with Live(console=self._console, refresh_per_second=8, transient=True) as live:
            while any(worker.is_alive() for worker in workers):
                now = tally.equal + tally.different - done
                progress.update(task, completed=now)
                rate = 2 * now / (time.monotonic() - begun)
                heading = f"{rate:,.0f} requests/s   p50 {_ms(tally, 0.5)}   p99 {_ms(tally, 0.99)}"
                live.update(Group(progress, self._view(heading)))
                workers[0].join(0.125)
        tally.busy += time.monotonic() - begun
        now = tally.equal + tally.different - done
        self._say(f"{title}: {now} keys, {2 * now / (time.monotonic() - begun):,.0f} requests/s")

    def _requester(self, keys: int, tally: Tally) -> None:
        try:
            self._ask_for(keys, tally)
        except (UpcallError, OSError) as error:
            if not self._ending.is_set():
                tally.refusal(error_words(error))

    def _ask_for(self, keys: int, tally: Tally) -> None:
        with Client(self._broker_folder) as client:
            for _ in range(keys):
                if self._ending.is_set():
                    return
                key = secrets.token_bytes(16 + secrets.randbelow(49))
                first = time.perf_counter()
                try:
                    wrapped = client.wrap(self._signature, key)
                    second = time.perf_counter()
                    back = client.unwrap(self._signature, wrapped)
                except Refused as refused:
                    tally.refusal(refused.reason)
                    continue
                tally.trip(back == key, (second - first, time.perf_counter() - second))

    def _view(self, title: str) -> Text:
        """Returns a table of the message contexts that are pending now."""
        status = self._status() or {"daemons": []}
        pending = [each for daemon in status["daemons"] for each in daemon["pending"]]
        rows = [
            (str(each["index"]), str(each["seq"]).rjust(10), each["service"].rjust(8), f"{each['age'] * 1000:.1f} ms")
            for each in pending[:_IN_HAND]
        ]
        heads = [Column(head, right=True) for head in ("index", "sequence", "service", "age")]
        width = self._console.width if self._console.is_terminal else None
        text = Text(title, style="bold", no_wrap=True)
        return text.append("\n").append(Text.from_ansi("\n".join(table_lines(heads, rows, width))))

    def kill_the_daemon(self, tally: Tally) -> None:
        """Stops the daemon, sends it requests, kills it. Checks that they are refused at once, and that a new daemon
        works."""
        self._daemon.send_signal(signal.SIGSTOP)
        _wait(lambda: procfs.stopped(self._daemon.pid), "the daemon's stop")
        ended: list[float] = []

        def ask() -> None:
            try:
                with Client(self._broker_folder) as client:
                    client.wrap(self._signature, b"k" * 16)
            except Refused as refused:
                tally.refusal(refused.reason)
                ended.append(time.monotonic())
            except (UpcallError, OSError) as error:
                if not self._ending.is_set():
                    tally.refusal(error_words(error))

        threads = [threading.Thread(target=ask) for _ in range(_IN_HAND)]
        for thread in threads:
            thread.start()
        _wait(lambda: len((self._status() or {"daemons": [{"pending": []}]})["daemons"][0]["pending"]) == _IN_HAND,
              "the requests")  # fmt: skip
        self._console.print(self._view("pending"))
        self._say(f"the daemon was stopped, and has {_IN_HAND} requests in its hands; now it is killed (SIGKILL)")
        killed = time.monotonic()
        self._daemon.kill()
        for thread in threads:
            thread.join(_PATIENCE)
        self._say(
            f"{len(ended)} of {_IN_HAND} requests refused (daemon-gone), "
            f"the last {1000 * (max(ended, default=killed) - killed):.0f} ms after the kill"
        )
        self._daemon = self._start_daemon()
        self._say("a new daemon has registered")

    def summary(self, tally: Tally, keys: int) -> bool:
        status = self._status() or {"outcomes": {}}
        requests = 2 * (tally.equal + tally.different)
        rows = (
            ("keys wrapped, unwrapped and equal", f"{tally.equal} of {keys}"),
            ("requests per second", f"{requests / tally.busy:,.0f}"),
            ("p50, p99", f"{_ms(tally, 0.5)}, {_ms(tally, 0.99)}"),
            *((f"refused: {reason}", str(count)) for reason, count in tally.refused.items()),
            *(
                (f"the broker counted: {outcome}", str(count))
                for outcomes in status["outcomes"].values()
                for outcome, count in outcomes.items()
            ),
        )
        print_table(self._console, "summary", ["what", Column("figure", right=True)], rows)
        good = tally.equal == keys and not tally.different and tally.refused == {"daemon-gone": _IN_HAND}
        self._console.print("every key came back equal" if good else "SOMETHING WENT WRONG")
        if not good:
            self._show_log()
        return good

    def _show_log(self) -> None:
        self._console.print((self._folder / "log").read_text("utf-8", "replace")[-4000:], markup=False)

    def _say(self, text: str) -> None:
        self._console.print(f"✓ {text}", highlight=False)


def _ms(tally: Tally, share: float) -> str:
    return f"{1000 * tally.quantile(share):.2f} ms"


def _wait(true: Callable[[], bool], what: str) -> None:
    """Polls a condition until it is true. UpcallError after a time-out. `what`: the condition, for the error."""
    for _ in _ticks():
        if true():
            return
    raise UpcallError(f"{what} did not come within {_PATIENCE:g} s")


def _ticks() -> Iterator[None]:
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        yield
        time.sleep(0.01)

"""Runs the parts of the test suite beside each other: `python -m tests.run_parts [--all]`. `make test` runs this.

Two queues run at the same time, because one waits where the other computes: what runs on this kernel, and what boots a
virtual machine. Each line of output begins with its part's name; the whole output of each part is kept in build/tests.
At the end a table shows the exit code, the wall time and the processor time of each part. The exit code is the first
one that is not 0, in the table's order. `--all` adds what takes long and rarely fails.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

HERE: Final = Path(__file__).resolve().parent
OUTPUT: Final = HERE.parent / "build" / "tests"
WORKERS: Final = max(2, os.cpu_count() or 1)  # of pytest-xdist; many tests wait, so fewer leave processors idle


class Part(NamedTuple):
    name: str
    module: str
    arguments: tuple[str, ...]


class Done(NamedTuple):
    part: Part
    code: int
    seconds: float  # wall time
    processor: float  # user and system time in seconds, of the part's processes that were waited for


def _pytest(name: str, marked: str, *arguments: str) -> Part:
    return Part(name, "pytest", ("-q", "-m", marked, f"--junitxml={OUTPUT / name}.xml", *arguments))


_PARALLEL: Final = ("-n", str(WORKERS), "--dist", "loadfile", "--cited", "tests", "--cited", "plugins")
_USUAL: Final = "not kernel and not attack and not lab"

QUEUES: Final = (
    (_pytest("sockets", f"{_USUAL} and not long", *_PARALLEL),),
    (
        Part("link", "tests.run_lab", ("--core",)),
        _pytest("lab", "lab and not long", "tests/lab"),
        Part("fuzz", "fuzz", ("--seconds", "60")),
    ),
)
# The attacks measure nothing, but they spin: they are in the queue of what computes.
ALL: Final = (
    (
        _pytest("sockets", _USUAL, *_PARALLEL),
        _pytest("attacks", "attack", "--cited", "tests/attacks", "tests/attacks"),
        Part("fuzz", "fuzz", ("--seconds", "60")),
    ),
    (_pytest("lab", "lab", "tests/lab"), Part("kernel", "tests.run_lab", ())),
)


class Running:
    """The parts' processes, one for each queue at a time."""

    def __init__(self) -> None:
        self.done: list[Done] = []
        self._lock = threading.Lock()  # of what follows, and of standard output
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def queue(self, parts: Sequence[Part]) -> None:
        """Runs the parts one after another."""
        for part in parts:
            with self._started(part) as process:
                if process is None:
                    return
                self._copy(part, process)

    def stop(self) -> None:
        """Ends the running parts with SIGTERM, and starts no others. In any thread."""
        with self._lock:
            self._stopped = True
            for process in self._processes:
                process.terminate()

    @contextlib.contextmanager
    def _started(self, part: Part) -> Iterator[subprocess.Popen[bytes] | None]:
        command = [sys.executable, "-m", part.module, *part.arguments]
        with self._lock:
            if self._stopped:
                yield None
                return
            process = subprocess.Popen(
                command, cwd=HERE.parent, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
            self._processes.add(process)
        began = time.monotonic()
        try:
            yield process
        finally:
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            with self._lock:
                self._processes.discard(process)
                self.done.append(
                    Done(part, process.returncode, time.monotonic() - began, used.ru_utime + used.ru_stime)
                )

    def _copy(self, part: Part, process: subprocess.Popen[bytes]) -> None:
        """Copies a part's output to its file and, line by line, to standard output, until its end."""
        assert process.stdout is not None
        with (OUTPUT / f"{part.name}.log").open("wb") as file, process.stdout as output:
            for line in output:
                file.write(line)
                with self._lock:
                    sys.stdout.buffer.write(f"{part.name:8} ".encode() + line)
                    sys.stdout.buffer.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="with what takes long: attacks, every group of ring 3")
    queues = ALL if parser.parse_args(arguments).all else QUEUES
    OUTPUT.mkdir(parents=True, exist_ok=True)
    running, began = Running(), time.monotonic()
    threads = [threading.Thread(target=running.queue, args=(parts,), name=parts[0].name) for parts in queues]

    def interrupted(number: int, _frame: object) -> None:
        running.stop()
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupted)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    order = [part.name for parts in queues for part in parts]
    done = sorted(running.done, key=lambda one: order.index(one.part.name))
    print("\npart       exit code  wall time  processor time")
    for one in done:
        print(f"{one.part.name:10} {one.code:9} {one.seconds:8.0f} s {one.processor:13.0f} s")
    print(f"{'together':10} {'':9} {time.monotonic() - began:8.0f} s")
    return next((one.code for one in done if one.code), 0)


if __name__ == "__main__":
    sys.exit(main())

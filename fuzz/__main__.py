"""`python -m fuzz [--seconds N] [--jobs N] [--keep] [TARGET...]`: fuzzes targets, and stores findings.

`--seconds`: wall-clock time for all targets together. `--keep`: adds inputs that reached new code to the corpus.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Final, NamedTuple

from fuzz.one import TIME_LIMIT, UNAVAILABLE
from fuzz.target import CORPUS, HERE, load, names

FINDINGS: Final = HERE / "findings"
LARGEST: Final = 512  # bytes of an input in the repository
MOST_KEPT: Final = 24  # inputs of a target in the repository
_STARTING: Final = 2.0  # seconds that a target needs to start
_GRACE: Final = 300  # seconds beyond its time after which a target is killed: a busy machine may starve it


class Done(NamedTuple):
    name: str
    code: int
    runs: int
    told: str
    found: tuple[Path, ...]


def explore(name: str, seconds: int, keep: bool) -> Done:
    with tempfile.TemporaryDirectory(prefix="upcall-fuzz-") as folder:
        corpus, found = Path(folder) / "corpus", Path(folder) / "found"
        corpus.mkdir()
        found.mkdir()
        words = [sys.executable, "-m", "fuzz.one", name, "--seconds", str(seconds), str(corpus), str(found)]
        environment = {**os.environ, "TMPDIR": folder}  # libFuzzer ends the process without cleaning up
        try:
            done = subprocess.run(
                words, cwd=HERE.parent, env=environment, stdin=subprocess.DEVNULL,
                capture_output=True, text=True, errors="replace", timeout=seconds + _GRACE,
            )  # fmt: skip
            code, told = done.returncode, done.stdout + done.stderr
        except subprocess.TimeoutExpired as error:
            code, told = -1, f"did not end within {error.timeout:.0f} s"
        runs = re.search(r"number_of_executed_units: *(\d+)", told)
        if keep and code == 0:
            _keep(name, corpus)
        slow = [path for path in found.iterdir() if "-timeout-" in path.name and _fast_enough(name, path)]
        for path in slow:
            path.unlink()
        moved = _move(name, found, told)
        if slow and not moved:
            code = os.EX_OK
        if code not in (os.EX_OK, UNAVAILABLE) and not moved:
            moved.append(_ended(name, code, told))
        return Done(name, code, int(runs[1]) if runs else 0, told, tuple(moved))


def _fast_enough(name: str, path: Path) -> bool:
    """Whether an input that took too long takes less than TIME_LIMIT of processor time: libFuzzer measures wall time,
    and stops a process that a busy machine does not let run."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (TIME_LIMIT, TIME_LIMIT))

    words = [sys.executable, "-m", "fuzz.one", name, str(path)]
    done = subprocess.run(words, cwd=HERE.parent, stdin=subprocess.DEVNULL, capture_output=True, preexec_fn=limited)
    return done.returncode == os.EX_OK


def _move(name: str, found: Path, told: str) -> list[Path]:
    """Stores each finding in a file, with the output and the command that reproduces it in another. Returns them."""
    moved = []
    for path in sorted(found.iterdir()):
        FINDINGS.mkdir(exist_ok=True)
        there = FINDINGS / path.name
        there.write_bytes(path.read_bytes())
        command = f"{sys.executable} -m fuzz.one {name} {there.relative_to(HERE.parent)}"
        there.with_suffix(".txt").write_text(f"{command}\n\n{told[-8000:]}\n")
        moved.append(there)
    return moved


def _ended(name: str, code: int, told: str) -> Path:
    """Stores the output of a target that ended without a failing input: killed, or broken at its start."""
    FINDINGS.mkdir(exist_ok=True)
    there = FINDINGS / f"{name}-ended.txt"
    there.write_text(f"{sys.executable} -m fuzz {name}\n\nended with {code}\n{told}\n")
    return there


def _keep(name: str, corpus: Path) -> None:
    """Adds some of the inputs that reached new code to the repository's corpus, of all sizes."""
    target = load(name)
    there = CORPUS / name
    there.mkdir(parents=True, exist_ok=True)
    known = {*target.inputs(), b""}
    new = {path.read_bytes() for path in corpus.iterdir()} - known
    fitting = sorted((data for data in new if len(data) <= LARGEST), key=lambda data: (len(data), data))
    room = MOST_KEPT - len(list(there.iterdir()))
    for data in fitting[:: max(1, len(fitting) // max(1, room))][: max(0, room)]:
        (there / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    options.add_argument("--seconds", type=int, default=3600)
    options.add_argument("--jobs", type=int, default=2)
    options.add_argument("--keep", action="store_true")
    options.add_argument("targets", nargs="*", metavar="TARGET", choices=[[], *names()])
    told = options.parse_args()
    chosen = told.targets or names()
    each = max(1, int(told.seconds * told.jobs / len(chosen) - _STARTING))
    print(f"{len(chosen)} targets, {each} s each, {told.jobs} at a time; at most {TIME_LIMIT} s for one input")
    began, bad, unavailable, runs = time.monotonic(), 0, 0, 0
    with ThreadPoolExecutor(told.jobs) as pool:
        running = [pool.submit(explore, name, each, told.keep) for name in chosen]
        for count, future in enumerate(as_completed(running), 1):
            done = future.result()
            runs += done.runs
            unavailable += done.code == UNAVAILABLE
            bad += done.code not in (os.EX_OK, UNAVAILABLE)
            _say(done, count, len(chosen), time.monotonic() - began)
    if unavailable:
        print(f"{unavailable} targets left out: there is no atheris here; pytest runs their corpus all the same")
    print(f"{runs:,} inputs in {time.monotonic() - began:.0f} s, {bad} targets with findings")
    return 1 if bad else os.EX_OK


def _say(done: Done, count: int, of: int, seconds: float) -> None:
    if done.code == UNAVAILABLE:
        words = "left out"
    elif done.code == os.EX_OK:
        words = f"{done.runs:,} inputs"
    else:
        words = f"FOUND {', '.join(str(path) for path in done.found)}"
    print(f"[{count:2}/{of} {seconds:5.0f} s] {done.name:18} {words}", flush=True)
    if done.found:
        lines = done.told.splitlines()
        print("\n".join(f"    {line}" for line in lines if "Error" in line or "ERROR" in line))
    for path in done.found:
        if path.suffix != ".txt":
            print(f"    {sys.executable} -m fuzz.one {done.name} {path}")


if __name__ == "__main__":
    sys.exit(main())

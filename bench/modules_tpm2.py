"""Measures the key module tpm2 with a software TPM: opening a key, which uses the TPM, and wrapping, which does not.

    python -m bench.modules_tpm2

Opening is compared with the same steps by commands of tpm2-tools, with a process for each.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from upcall_tpm2 import module
from upcall_tpm2.keyfile import take_key_file
from upcall_tpm2.swtpm import SoftwareTpm, missing

from bench.rows import FULL, Effort, Row, compared, show
from bench.stage import BenchError, Stage
from upcall.keymodule import MAX_KEY, Enrolled, KeyHandle, Limits, Making
from upcall.keys.enrolment import chosen
from upcall.testing.secrets import GivenSecrets

_GROUP = "key module tpm2, with a TPM in software"
_BATCH = 50  # calls between two readings of the clock
_PATIENCE = 30.0  # seconds, the time-out of a command
_TOOLS = "tpm2-tools"
_TEMPLATE = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|restricted|decrypt"
_COMMANDS = (
    f"tpm2_createprimary -Q -C o -G ecc -a {_TEMPLATE} -c primary",
    "tpm2_load -Q -C primary -u public -r private -c key",
    "tpm2_startauthsession -Q --hmac-session -c primary -S session",
    "tpm2_sessionconfig -Q --enable-encrypt session",
    "tpm2_unseal -Q -c key -p session:session -o unsealed",
    "tpm2_flushcontext -Q session",
)


def rows(stage: Stage, effort: Effort) -> Iterator[Row]:
    if why := missing() or ("" if shutil.which("tpm2_unseal") else "apt-get install tpm2-tools"):
        raise BenchError(why)
    with SoftwareTpm(stage.folder / "tpm") as tpm:
        path = stage.folder / "key.tss2"
        values = chosen(module.parameters, {"tcti": tpm.tcti})
        key = module.generate(Making(path, values, bytearray(), "none", Limits(), GivenSecrets()))
        ours, theirs = [], []
        for _ in range(effort.rounds):
            ours.append(_milliseconds(partial(_open, key)))
            theirs.append(_by_tools(tpm.tcti, path, stage.folder))
        yield compared(_GROUP, "opening", "ms", ours, theirs, _TOOLS, at_most=1.0)
        handle = _open(key)
    clear = os.urandom(MAX_KEY)
    wrapped = handle.wrap(clear)
    verbs: dict[str, Callable[[], object]] = {
        "wraps": partial(handle.wrap, clear),
        "unwraps": partial(handle.unwrap, wrapped),
    }
    for name, verb in verbs.items():
        found = statistics.median(_per_second(verb, effort.seconds * 0.2) for _ in range(effort.rounds))
        yield Row(_GROUP, name, "/s", found)


def _open(key: Enrolled) -> KeyHandle:
    return module.open(key.signature, key.blob, GivenSecrets())


def _by_tools(tcti: str, path: Path, folder: Path) -> float:
    """Returns the milliseconds of the commands that unseal the key. Flushes the TPM in between: it has no resource
    manager."""
    sealed, took = take_key_file(path.read_bytes()), 0.0
    (folder / "public").write_bytes(sealed.public)
    (folder / "private").write_bytes(sealed.private)
    run = partial(
        subprocess.run,
        cwd=folder,
        env={**os.environ, "TPM2TOOLS_TCTI": tcti},
        check=True,
        capture_output=True,
        timeout=_PATIENCE,
    )
    try:
        for command in _COMMANDS:
            took += _milliseconds(partial(run, command.split()))
            run(["tpm2_flushcontext", "--transient-object"])
    except subprocess.CalledProcessError as error:
        raise BenchError(f"{error.cmd[0]}: {error.stderr.decode('utf-8', 'replace').strip()}") from None
    return took


def _milliseconds(work: Callable[[], object]) -> float:
    start = time.monotonic()
    work()
    return (time.monotonic() - start) * 1000


def _per_second(work: Callable[[], object], seconds: float) -> float:
    """Returns calls per second of processor time, to reduce the influence of other processes."""
    count, start = 0, time.thread_time()
    while (took := time.thread_time() - start) < seconds:
        for _ in range(_BATCH):
            work()
        count += _BATCH
    return count / took


if __name__ == "__main__":
    with Stage() as the_stage:
        show(list(rows(the_stage, FULL)))

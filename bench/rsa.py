"""Measures RSA-2048 end to end, against the processors' limit by `openssl speed`."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial

from bench.packets import new_file_key, unwrap
from bench.rows import Effort, Row, bounded, by_turns, compared
from bench.stage import BenchError, Client, Stage, cpu_us, rss_mb
from upcall.keymodule import Limits, Making
from upcall.testing.secrets import GivenSecrets

_ALIAS, _SPEC = "openssl", "upcall_rsa:module"
_UNWRAPS = 500
_INFLIGHT = 8  # four for each processor, so that none is idle


def rows(stage: Stage, effort: Effort) -> Iterator[Row]:
    asked, unwrap_once = new_key(stage)
    alone, broker = stage.place(), stage.place()
    direct = stage.client("drive-daemon", alone)
    pids = [stage.broker(broker)]
    pids += [stage.daemon(folder, {_ALIAS: _SPEC}) for folder in (alone, broker)]
    through = stage.client("drive-broker", broker / "broker.sock", os.geteuid()).ready()
    direct.ready().body(*asked).run(20)
    through.body(*asked).await_daemon().run(20)
    seconds = max(1, round(effort.seconds * 2))
    contenders: dict[str, Callable[[], float]] = {
        "openssl": partial(_openssl, seconds),
        "direct": lambda: _per_second(direct, seconds),
        "through": lambda: _per_second(through, seconds),
    }
    found = by_turns(contenders, max(1, effort.rounds // 2))
    row = partial(compared, "RSA-2048, unwraps from end to end, two processors")
    peer = "openssl speed -multi 2"
    yield row("daemon alone", "/s", found["direct"], found["openssl"], peer, at_least=0.88)
    yield row("through our broker", "/s", found["through"], found["openssl"], peer, at_least=0.88)
    cpu = by_turns({"ours": partial(_cpu, direct), "module": partial(_cpu_here, unwrap_once)}, effort.rounds)
    yield row("daemon's processor time per unwrap", "us", cpu["ours"], cpu["module"], "the key module by itself")
    yield bounded("RSA-2048, unwraps from end to end, two processors", "daemon's rss", "MB", rss_mb(direct.other), 25)
    stage.end([direct.pid, through.pid, *pids])


def new_key(stage: Stage) -> tuple[tuple[bytes, bytes], Callable[[], object]]:
    """Adds a new key to the user keyring. Returns (request, expected answer), and the same unwrap in this process."""
    try:
        from upcall_rsa import module
    except ImportError:
        raise BenchError("the RSA key module is not installed (plugins/rsa)") from None
    making = Making(stage.folder / "key.pem", {"bits": "2048"}, bytearray(), "none", Limits(), GivenSecrets())
    enrolled = module.generate(making)
    stage.add_key(enrolled.signature, _ALIAS, enrolled.blob)
    clear = new_file_key()
    handle = module.open(enrolled.signature, enrolled.blob, GivenSecrets())
    wrapped = handle.wrap(clear)
    return unwrap(enrolled.signature, clear, wrapped), partial(handle.unwrap, wrapped)


def _cpu(client: Client) -> float:
    before = cpu_us(client.other)
    answered = client.run(_UNWRAPS, _INFLIGHT).answered
    return (cpu_us(client.other) - before) / answered


def _cpu_here(unwrap_once: Callable[[], object]) -> float:
    before = time.process_time()
    for _ in range(_UNWRAPS):
        unwrap_once()
    return (time.process_time() - before) / _UNWRAPS * 1e6


def _per_second(client: Client, seconds: int) -> float:
    return client.run(1_000_000, _INFLIGHT, seconds).per_second


def _openssl(seconds: int) -> float:
    """Returns private operations per second of wall-clock time, the last but one column of `openssl speed`."""
    program = shutil.which("openssl")
    if program is None:
        raise BenchError("there is no openssl to compare with")
    command = [program, "speed", "-elapsed", "-seconds", str(seconds), "-multi", "2", "rsa2048"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30 + 4 * seconds, check=True)
    return float(done.stdout.split()[-2])

"""Measures the start of broker and daemon, as the units start them: from exec until requests can be answered."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from bench.rows import Effort, Row, bounded
from bench.rsa import new_key
from bench.stage import BenchError, Stage, rss_mb
from upcall.client import Client, NoBroker
from upcall.testing.played import PlayedBroker

_PATIENCE = 10.0
_LOOK = 0.001  # seconds between two polls
_DAEMON, _BROKER = (["-I", "-m", "upcall", one] for one in ("daemon", "broker"))  # as in ExecStart
_SERVICES = ("dns_resolver", "cifs.spnego", "quota")  # of the handlers of this repository


def rows(stage: Stage, effort: Effort) -> Iterator[Row]:
    daemon, broker = partial(bounded, "footprint of a daemon"), partial(bounded, "footprint of a broker")
    folder = stage.place()
    running = stage.broker(folder)
    rounds = effort.rounds + 2
    yield daemon("exec to registered", "ms", _median(rounds, lambda: _daemon_ms(stage, folder)), 300)
    yield Row(
        "footprint of a daemon", "rss, every handler of ours loaded", "MB", _with_handlers_mb(stage),
        note="with every handler: dnspython alone is 11 MB, in the daemon that is asked for names, root's",
    )  # fmt: skip
    new_key(stage)
    yield daemon("the same, an RSA key opened", "ms", _median(rounds, lambda: _daemon_ms(stage, folder)), 300)
    stage.end([running])
    yield broker("exec to ready", "ms", _median(rounds, lambda: _broker_ms(stage)), 300)


def _median(rounds: int, once: Callable[[], float]) -> float:
    once()  # warm-up: loads files from the disk
    return statistics.median(once() for _ in range(rounds))


def _daemon_ms(stage: Stage, folder: Path) -> float:
    with Client(folder) as client:

        def registered(process: subprocess.Popen[bytes]) -> bool:
            daemons = client.status()["daemons"]
            return any(daemon["pid"] == process.pid for daemon in daemons)

        return _ms(stage, [*_DAEMON, "--runtime", str(folder)], registered)


def _broker_ms(stage: Stage) -> float:
    folder = stage.place()

    def ready(_process: subprocess.Popen[bytes]) -> bool:
        with contextlib.suppress(NoBroker), Client(folder) as client:
            return bool(client.status())
        return False

    return _ms(stage, [*_BROKER, "--runtime", str(folder), "--no-ecryptfs"], ready)


def _ms(stage: Stage, arguments: list[str], there: Callable[[subprocess.Popen[bytes]], bool]) -> float:
    begun = time.monotonic()
    process = stage.start([sys.executable, *arguments])
    while not there(process):
        if time.monotonic() - begun > _PATIENCE or process.poll() is not None:
            raise BenchError(f"{arguments} does not serve")
        time.sleep(_LOOK)
    took = time.monotonic() - begun
    stage.end([process.pid])
    return took * 1000


def _with_handlers_mb(stage: Stage) -> float:
    """Returns the memory of a daemon with all handlers loaded: sends each a malformed request, which loads it."""
    folder = stage.place()
    broker = PlayedBroker(folder)
    process = stage.start([sys.executable, *_DAEMON, "--runtime", str(folder)])
    broker.register()
    for number, service in enumerate(_SERVICES, 1):
        broker.ask(number, b"?", service)
        broker.response()
    found = rss_mb(process.pid)
    stage.end([process.pid])
    return found

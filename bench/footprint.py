"""Measures the cost of an idle daemon: import time and memory."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

from bench import starting
from bench.packets import NOOP_MODULES, new_signature, noop_wrap
from bench.rows import Effort, Row, bounded
from bench.stage import Stage, rss_mb

_TIMED = "import time; t = time.perf_counter(); import {}; print((time.perf_counter() - t) * 1000)"
_REQUESTS = 10_000
_INTERPRETERS = 9
_FIRST, _BOTH = "rss, nothing asked yet", f"rss after {_REQUESTS:,} requests"


def rows(stage: Stage, effort: Effort) -> Iterator[Row]:
    signature = new_signature()
    stage.add_key(signature)
    folder = stage.place()
    daemon_row, broker_row = partial(bounded, "footprint of a daemon"), partial(bounded, "footprint of a broker")
    yield daemon_row("imports", "ms", _import_ms("upcall.daemon.__main__"), 60)
    broker = stage.broker(folder)
    daemon = stage.daemon(folder, NOOP_MODULES)
    bare = stage.start([sys.executable, "-c", "import time; time.sleep(600)"]).pid
    client = stage.client("drive-broker", folder / "broker.sock", os.geteuid()).ready()
    client.body(*noop_wrap(signature)).await_daemon()
    peer = (rss_mb(bare), "bare interpreter")
    yield daemon_row(_FIRST, "MB", rss_mb(daemon), 25, *peer)
    before = rss_mb(broker)
    client.run(_REQUESTS, 32, 30)
    yield daemon_row(_BOTH, "MB", rss_mb(daemon), 25, *peer)
    yield broker_row("imports", "ms", _import_ms("upcall.broker.__main__"), 60)
    yield broker_row(_FIRST, "MB", before, 40, *peer)
    yield broker_row(_BOTH, "MB", rss_mb(broker), 40, *peer)
    stage.end([client.pid, daemon, broker, bare])
    yield from starting.rows(stage, effort)


def _import_ms(module: str) -> float:
    """Returns the median time in new interpreters, in milliseconds."""
    command = [sys.executable, "-c", _TIMED.format(module)]
    return statistics.median(
        float(subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout)
        for _ in range(_INTERPRETERS)
    )

"""`python -m bench`: runs the benchmarks and prints their tables. Exit status 1 if one could not be run."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench import (
    files,
    flooding,
    footprint,
    hardening,
    isolation,
    library,
    modules,
    native,
    quota,
    requestkey,
    roundtrip,
    rsa,
)
from bench.conditions import drift, interpreter, load, processors
from bench.rows import FULL, QUICK, WATCH, Effort, Row, show, write_json
from bench.stage import BenchError, Stage

sys._xoptions["upcall-environment"] = (
    True  # finds the no-op key module by PYTHONPATH, also as root: see process/start_python
)

GROUPS: dict[str, Callable[[Stage, Effort], Iterator[Row]]] = {
    "daemon": roundtrip.daemon_rows,
    "broker": roundtrip.broker_rows,
    "rsa": rsa.rows,
    "ecryptfsd": native.rows,
    "modules": modules.rows,
    "pyroute2": library.rows,
    "flooding": flooding.rows,
    "footprint": footprint.rows,
    "hardening": hardening.rows,
    "isolation": isolation.rows,
    "quota": quota.rows,
    "quota-kernel": quota.kernel_rows,
    "files": files.rows,
    "requestkey": requestkey.rows,
    "requestkey-uml": requestkey.uml_rows,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Ratios of ours to a peer, from one run.")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: rough figures")
    parser.add_argument("--only", action="append", choices=GROUPS, help="this group; may be given several times")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # runs the clean-up of stages
    effort = QUICK if options.quick else FULL
    WATCH.left = effort.patience
    rows: list[Row] = []
    failed = False
    print(f"interpreter  {interpreter()}\nprocessors   {processors()}\nload         {load()}", flush=True)
    for name in options.only or GROUPS:
        start = time.monotonic()
        try:
            with Stage() as stage:
                stage.compile()
                found = list(GROUPS[name](stage, effort))
        except BenchError as error:
            print(f"bench: {name}: {error}", file=sys.stderr)
            failed = True
            continue
        show(found)
        print(f"  {time.monotonic() - start:.0f} s", flush=True)
        rows += found
    print(f"\nspeed        {drift(row.spread for row in rows)}\nload         {WATCH}; {load()}")
    if options.json:
        write_json(options.json, rows)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Measures the processor time per message of pyroute2, which upcall.kernel.netlink does not use for this reason."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial

from bench.packets import new_signature, noop_wrap
from bench.rows import Effort, Row, by_turns, compared
from bench.stage import Client, Stage, cpu_us, together


def rows(stage: Stage, effort: Effort) -> Iterator[Row]:
    clients = {which: _echo(stage, which) for which in ("upcall", "pyroute2")}
    found = by_turns(
        {which: partial(_cpu, client, effort.messages) for which, client in clients.items()}, effort.rounds
    )
    yield compared(
        "netlink in Python: take a REQUEST, answer it", "processor time per message", "us", found["upcall"],
        found["pyroute2"], "pyroute2", note="pyroute2 checks no credentials: it does not hand them out",
    )  # fmt: skip
    stage.end(pid for client in clients.values() for pid in (client.pid, client.other))


def _echo(stage: Stage, which: str) -> Client:
    folder = stage.place()
    client = stage.client("drive-daemon", folder)
    stage.await_file(folder / "registration.sock", client.pid)
    stage.start([sys.executable, "-m", "bench.echo", which, str(folder)])
    asked, _ = noop_wrap(new_signature())
    client.ready().body(asked, b"").run(200)
    return client


def _cpu(client: Client, count: int) -> float:
    with together([client.pid, client.other]):
        before = cpu_us(client.other)
        answered = client.run(count).answered
        return (cpu_us(client.other) - before) / answered

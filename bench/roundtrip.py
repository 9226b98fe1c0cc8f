"""Measures round trips of the daemon alone and of broker and daemon, each against the same in C."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bench.conditions import Series
from bench.packets import NOOP_MODULES, new_signature, noop_wrap
from bench.rows import Effort, Row, by_turns, compared
from bench.stage import Client, Stage, cpu_us, together

WARM_UP = 300


class Line(NamedTuple):
    """A client and the processes that answer it."""

    client: Client
    servers: tuple[int, ...]

    @property
    def pids(self) -> tuple[int, ...]:
        return (self.client.pid, *self.servers)

    def p50(self, count: int) -> float:
        with together(self.pids):
            return self.client.run(count).p50

    def p99(self, count: int) -> float:
        with together(self.pids):
            return self.client.run(count).p99

    def p50_anywhere(self, count: int) -> float:
        return self.client.run(count).p50

    def cpu(self, count: int) -> float:
        """Returns the processor time per message of all answering processes, in microseconds."""
        with together(self.pids):
            before = sum(map(cpu_us, self.servers))
            answered = self.client.run(count).answered
            return (sum(map(cpu_us, self.servers)) - before) / answered

    def per_second(self, inflight: int, seconds: float) -> float:
        return self.client.run(10_000_000, inflight, seconds).per_second


_Lines = dict[str, Line]


def compare(lines: _Lines, effort: Effort, measure: Callable[[Line], float]) -> dict[str, Series[float]]:
    return by_turns({name: partial(measure, line) for name, line in lines.items()}, effort.rounds)


def end(stage: Stage, lines: _Lines) -> None:
    stage.end(pid for line in lines.values() for pid in line.pids)


# --- the daemon alone ----------------------------------------------------------------------------------------


def daemon_rows(stage: Stage, effort: Effort) -> Iterator[Row]:
    """Measures the daemon alone. The client simulates the broker."""
    signature = new_signature()
    stage.add_key(signature)
    lines = {"ours": _ours_alone(stage, signature), "C": _c_alone(stage, signature, "keyring")}
    bare = {**lines, "C, no keyring": _c_alone(stage, signature)}
    group, many = "daemon alone, no-op key module", effort.messages
    row = partial(compared, group)
    found = compare(bare, effort, lambda line: line.cpu(many))
    yield row("processor time, 1 in flight", "us", found["ours"], found["C"], "C daemon", at_most=1.5)
    note = 'the C daemon looks each key up in the keyring, as ours does; "no keyring" is the same, but for that'
    yield row("", "us", found["ours"], found["C, no keyring"], "C daemon, no keyring", note=note)
    measures: dict[str, Callable[[Line], float]] = {
        "round trip p50, one processor": lambda line: line.p50(many),
        "round trip p99, one processor": lambda line: line.p99(many),
        "round trip p50, any processor": lambda line: line.p50_anywhere(many),
    }
    for title, measure in measures.items():
        found = compare(lines, effort, measure)
        goal = 1.5 if title == "round trip p50, one processor" else None
        yield row(title, "us", found["ours"], found["C"], "C daemon", at_most=goal)
    for inflight in (32, 256):
        found = compare(lines, effort, partial(Line.per_second, inflight=inflight, seconds=effort.seconds))
        yield row(f"throughput, {inflight} in flight", "/s", found["ours"], found["C"], "C daemon")
    end(stage, bare)


def _ours_alone(stage: Stage, signature: str) -> Line:
    folder = stage.place()
    client = stage.client("drive-daemon", folder)
    daemon = stage.daemon(folder, NOOP_MODULES)
    client.ready().body(*noop_wrap(signature)).run(WARM_UP)
    return Line(client, (daemon,))


def _c_alone(stage: Stage, signature: str, *options: str) -> Line:
    folder = stage.place()
    client = stage.client("drive-daemon", folder)
    daemon = _c_daemon(stage, folder, *options)
    client.ready().body(*noop_wrap(signature)).run(WARM_UP)
    return Line(client, (daemon,))


def _c_daemon(stage: Stage, folder: Path, *options: str) -> int:
    return stage.peer("daemon", folder, *options).pid


# --- through the broker --------------------------------------------------------------------------------------


def broker_rows(stage: Stage, effort: Effort) -> Iterator[Row]:
    """Measures requester -> broker -> daemon -> broker -> requester."""
    signature = new_signature()
    stage.add_key(signature)
    lines = {
        "ours": _through(stage, signature, broker_is_ours=True, daemon_is_ours=True),
        "C": _through(stage, signature, broker_is_ours=False, daemon_is_ours=False),
        "our broker": _through(stage, signature, broker_is_ours=True, daemon_is_ours=False),
        "our daemon": _through(stage, signature, broker_is_ours=False, daemon_is_ours=True),
        "C, no broker": _c_alone(stage, signature, "keyring"),
        "ours, no broker": _ours_alone(stage, signature),
    }
    whole = {name: lines[name] for name in ("ours", "C")}
    group, many, peer = "broker and daemon, no-op key module", effort.messages, "C broker and daemon"
    row = partial(compared, group)
    found = compare(lines, effort, lambda line: line.p50(many))
    yield row("round trip p50, one processor", "us", found["ours"], found["C"], peer, at_most=3)
    yield row("", "us", found["ours"], found["C, no broker"], "C daemon, no broker", at_most=3)
    yield row("  our broker, C daemon", "us", found["our broker"], found["C"], peer)
    yield row("  C broker, our daemon", "us", found["our daemon"], found["C"], peer)
    yield _hop(group, found)
    anywhere = compare(whole, effort, lambda line: line.p50_anywhere(many))
    yield row("round trip p50, any processor", "us", anywhere["ours"], anywhere["C"], peer, at_most=3)
    cpu = compare(whole, effort, lambda line: line.cpu(many))
    yield row("processor time, 1 in flight", "us", cpu["ours"], cpu["C"], peer)
    rate = compare(whole, effort, partial(Line.per_second, inflight=32, seconds=effort.seconds))
    yield row("throughput, 32 in flight", "/s", rate["ours"], rate["C"], peer)
    end(stage, lines)


def _hop(group: str, found: Mapping[str, Sequence[float]]) -> Row:
    """Returns the row for the broker's cost: a difference of medians, because single rounds vary too much."""
    middle = {name: statistics.median(figures) for name, figures in found.items()}
    ours, theirs = middle["ours"] - middle["ours, no broker"], middle["C"] - middle["C, no broker"]
    ratio = ours / theirs if theirs > 0 else None
    return Row(group, "added by the broker's hop", "us", ours, theirs, "C broker's hop", ratio)


def _through(stage: Stage, signature: str, broker_is_ours: bool, daemon_is_ours: bool) -> Line:
    folder = stage.place()
    if broker_is_ours:
        broker = stage.broker(folder)
    else:
        broker = stage.peer("broker", folder).pid
        stage.await_file(folder / "registration.sock", broker)
    daemon = stage.daemon(folder, NOOP_MODULES) if daemon_is_ours else _c_daemon(stage, folder, "keyring")
    client = stage.client("drive-broker", folder / "broker.sock", os.geteuid()).ready()
    client.body(*noop_wrap(signature)).await_daemon().run(WARM_UP)
    return Line(client, (broker, daemon))

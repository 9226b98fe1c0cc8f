"""Measures the cost of hardening (seccomp, Landlock) per request: with and without it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import partial

from bench.packets import NOOP_MODULES, new_signature, noop_wrap
from bench.roundtrip import WARM_UP, Line, compare, end
from bench.rows import Effort, Row, compared
from bench.stage import Stage
from upcall.broker.settings import BrokerSettings
from upcall.daemon.settings import DaemonSettings
from upcall.process.hardening import DaemonHardening
from upcall.process.settings import dumps
from upcall.testing.broker import BrokerForTests

_AT_MOST = 1.03  # goal for the ratio


def rows(stage: Stage, effort: Effort) -> Iterator[Row]:
    """Measures requester -> broker -> daemon -> broker -> requester, with both hardened and with none."""
    signature = new_signature()
    stage.add_key(signature)
    lines = {"ours": _through(stage, signature, True), "bare": _through(stage, signature, False)}
    row, peer = partial(compared, "broker and daemon, hardened"), "the same, not hardened"
    found = compare(lines, effort, lambda line: line.p50(effort.messages))
    yield row("round trip p50, one processor", "us", found["ours"], found["bare"], peer, at_most=_AT_MOST)
    found = compare(lines, effort, lambda line: line.cpu(effort.messages))
    yield row("processor time, 1 in flight", "us", found["ours"], found["bare"], peer, at_most=_AT_MOST)
    end(stage, lines)


def _through(stage: Stage, signature: str, hardened: bool) -> Line:
    folder = stage.place()
    system = folder.with_name(f"{folder.name}.toml")
    system.write_text("" if hardened else "[hardening]\nbroker = false\n")
    told = dumps(BrokerForTests(BrokerSettings(folder), system))
    broker = stage.start([sys.executable, "-m", "upcall.testing.broker", told]).pid
    stage.await_file(folder / "registration.sock", broker)
    daemon = stage.daemon(folder, NOOP_MODULES, DaemonSettings(hardening=DaemonHardening(wanted=hardened)))
    client = stage.client("drive-broker", folder / "broker.sock", os.geteuid()).ready()
    client.body(*noop_wrap(signature)).await_daemon().run(WARM_UP)
    return Line(client, (broker, daemon))

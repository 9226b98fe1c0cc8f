"""Measures the round trip of one user's requests while other users flood the broker.

The victim has a daemon of its own and makes one wrap request after the other. Two processors cannot serve four busy
processes and the victim at once in any case. So the control is the same number of processes that only use processor
time, and the broker's effect is the ratio to that.
"""

from __future__ import annotations

import os
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from bench.packets import NOOP_MODULES, new_signature, noop_wrap
from bench.rows import Effort, Row, by_turns, compared
from bench.stage import Client, Stage

_FIRST_UID = 64100  # unused on all distributions: above useradd's range, below nobody's uid
_SUBUIDS = range(640_000, 640_016)  # of one user, who has 64 connections of each
_GROUP = "flooding, a victim's round trip p50 through broker and daemon"
_Flooders = Sequence[Callable[[], subprocess.Popen[bytes]]]
_AS_ONE = "not root: everything runs as one uid, so that only strangers at the registration can be played"


def rows(stage: Stage, effort: Effort) -> Iterator[Row]:
    victim = _FIRST_UID if os.geteuid() == 0 else os.geteuid()
    folder = stage.place()
    subuid = stage.folder / "subuid"
    subuid.write_text(f"{_FIRST_UID + 1}:{_SUBUIDS[0]}:{len(_SUBUIDS)}\n")
    stage.broker(folder, subuid)
    client = _victim(stage, folder, victim)
    scenes = _scenes(stage, folder)
    contenders = {name: partial(_under, stage, client, effort, flooders) for name, flooders in scenes.items()}
    found = by_turns(contenders, max(2, effort.rounds - 2))
    note = "" if os.geteuid() == 0 else _AS_ONE
    for name in (name for name in scenes if name != "idle"):
        # Sixteen busy processes alone more than double the time, so compare with the control.
        goal = None if "burn" in name or "never" in name else 2.0
        yield compared(_GROUP, name, "us", found[name], found["idle"], "idle", at_most=goal, note=note)
        if goal:
            worst = max(found[name])
            calm = statistics.median(found["idle"])
            yield Row(_GROUP, "  its worst round", "us", worst, calm, "idle", worst / calm)
        control = f"{name.split()[0]} only burning"
        if control in scenes and control != name:
            yield compared(_GROUP, "  the same", "us", found[name], found[control], control)


def _victim(stage: Stage, folder: Path, uid: int) -> Client:
    signature = new_signature()
    stage.add_key(signature, uid=uid)
    stage.daemon_as(uid, folder, NOOP_MODULES)
    client = stage.client("drive-broker", folder / "broker.sock", uid, uid=uid).ready()
    client.body(*noop_wrap(signature)).await_daemon().run(200)
    return client


def _scenes(stage: Stage, folder: Path) -> dict[str, _Flooders]:
    """Returns name -> function that starts the flooding processes."""
    root = os.geteuid() == 0
    uids = [_FIRST_UID + 1 + number if root else None for number in range(4)]
    junk = [partial(stage.peer, "junk", folder, *([] if root else ["stranger"]), uid=uid) for uid in uids]
    burn = [partial(stage.peer, "burn", uid=uid) for uid in uids]
    scenes: dict[str, _Flooders] = {
        "idle": [],
        "1 only burning": burn[:1],
        "4 only burning": burn,
        **({"16 only burning": [partial(stage.peer, "burn", uid=uid) for uid in _SUBUIDS]} if root else {}),
        "1 with junk": junk[:1],
        "4 with junk": junk,
    }
    if root:
        body, _ = noop_wrap(new_signature())
        path = folder / "broker.sock"
        asking = [partial(stage.peer, "ask", path, uid, body.hex(), uid=uid) for uid in uids]
        scenes["1 with requests"], scenes["4 with requests"] = asking[:1], asking

        def held(where: Path, *body: str) -> _Flooders:
            return [partial(stage.peer, "hold", where, uid, 64, *body, uid=uid) for uid in _SUBUIDS]

        scenes["16 subuids, 1024 idle connections"] = held(path)
        scenes["16 subuids, 1024 that never read"] = held(path, body.hex())
        scenes["16 subuids, 1024 at the registration"] = held(folder / "registration.sock")
    return scenes


def _under(stage: Stage, client: Client, effort: Effort, flooders: _Flooders) -> float:
    """Returns the victim's p50 in microseconds while the processes run."""
    running = [start().pid for start in flooders]
    try:
        client.run(100, 1, 0.3)  # lets them register, and fill all queues
        return client.run(1_000_000, 1, effort.seconds).p50
    finally:
        stage.end(running)

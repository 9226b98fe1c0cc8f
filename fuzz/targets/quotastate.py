"""Fuzzes the stored state of the quota source: root's file, with notices whose names users chose.

Raises only PeerError. A loaded state dumps to one that loads to the same values. Malformed entries are counted.
"""

from __future__ import annotations

import json

from fuzz.target import same, taken
from fuzz.targets.quotanotice import _NOTICE
from upcall.protocols.quota.backlog import Kept
from upcall.protocols.quota.notice import pack
from upcall.protocols.quota.policy import Core
from upcall.protocols.quota.settings import Rules
from upcall.protocols.quota.state import dump, load

_DEVICES = {"/home": 2049}
_STATE = ["/home", 0, 1000, "space", 2, 1.0, None, 3, [1, 2, 3, 4], [[1000, 2, 5.0]]]
SEEDS = [
    json.dumps({"version": 1, "states": [_STATE], "kept": [[1000, pack(_NOTICE).decode()]]}).encode(),
    b'{"version":1,"states":' + b"[" * 3000,
    b'{"version":1,"states":[["/home",0,1e999,"space",2,null,null,3,[1,2,3,4],[]]]}',
]
MEMORY = 4 << 20


def run(data: bytes) -> None:
    core, kept = Core(Rules()), Kept()
    if taken(load, data, core, kept, _DEVICES, 10.0) is None:
        return
    points = {number: point for point, number in _DEVICES.items()}
    once = dump(core, kept, points)
    again, others = Core(Rules()), Kept()
    same(load(once, again, others, _DEVICES, 10.0), 0)
    same(json.loads(dump(again, others, points)), json.loads(once))

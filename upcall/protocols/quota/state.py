"""Saves and restores the state across a restart: levels, recipients, and undelivered notices. Pure.

    {"version": 1, "states": [[mount, kind, id, resource, level, since, stage, folded, figures, told], ...],
     "kept": [[uid, notice], ...]}

Filesystems are identified by mount point, because device numbers may change at a boot.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

from upcall.core.errors import PeerError
from upcall.protocols.quota import notice as quotanotice
from upcall.protocols.quota.backlog import Kept
from upcall.protocols.quota.notice import QuotaNotice
from upcall.protocols.quota.policy import LONG, Core, Key, State
from upcall.protocols.quota.warning import Figures

VERSION: Final = 1
_WHAT = "quota state"


def dump(core: Core, kept: Iterable[tuple[int, QuotaNotice]], points: Mapping[int, str]) -> bytes:
    """Returns the state as JSON. `kept`: undelivered notices with their uid. `points`: mount points by device number;
    states of other devices are omitted."""
    states = [
        [
            points[key.device],
            *key[1:],
            state.level,
            _or_none(state.since),
            _or_none(state.stage),
            state.folded,
            state.figures,
            [[uid, level, when] for uid, (level, when) in state.told.items()],
        ]
        for key, state in core.dump()
        if key.device in points
    ]
    waiting = [[uid, quotanotice.pack(notice).decode("ascii")] for uid, notice in kept]
    return json.dumps({"version": VERSION, "states": states, "kept": waiting}).encode("ascii")


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def load(data: bytes, core: Core, kept: Kept, devices: Mapping[str, int], now: float) -> int:
    """Restores a saved state into `core` and `kept`; returns the number of malformed entries. `now`: unix seconds.
    PeerError if the whole is malformed."""
    try:
        saved = json.loads(data)
    except (ValueError, RecursionError):
        raise PeerError(_WHAT, "is not JSON") from None
    if not isinstance(saved, dict) or saved.get("version") != VERSION:
        raise PeerError(_WHAT, f"is not an object of version {VERSION}")
    damaged = 0
    for take, entries in ((_take_state, saved.get("states")), (_take_kept, saved.get("kept"))):
        for entry in entries if isinstance(entries, list) else ():
            try:
                take(entry, core, kept, devices, now)
            except (TypeError, ValueError, OverflowError, PeerError):
                damaged += 1
    return damaged


def _take_state(entry: Any, core: Core, _: Kept, devices: Mapping[str, int], now: float) -> None:
    mount, kind, number, resource, level, since, stage, folded, figures, recipients = entry
    if mount not in devices:
        return  # it is not mounted now
    if kind not in (0, 1, 2) or resource not in (quotanotice.SPACE, quotanotice.FILES) or not 0 < level <= LONG:
        raise ValueError
    state = State()
    state.level = float(level)
    state.since = math.inf if since is None else float(since)
    state.stage = -math.inf if stage is None else float(stage)
    state.folded = int(folded)
    state.figures = Figures(*(int(one) for one in figures))
    state.told = {int(uid): (float(known), float(when)) for uid, known, when in recipients}
    core.restore(Key(devices[mount], kind, int(number), resource), state, now)


def _take_kept(entry: Any, _: Core, kept: Kept, __: Mapping[str, int], ___: float) -> None:
    uid, notice = entry
    kept.put(int(uid), quotanotice.take(notice.encode("ascii") if isinstance(notice, str) else b""))

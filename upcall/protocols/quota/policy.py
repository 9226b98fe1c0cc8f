"""Decides who is notified of which quota event and when; suppresses repetitions. Pure; times are unix seconds.

For each quota (owner, filesystem, space or files) a state holds the level: the worst that was notified since the quota
was last below its limits. Input is the kernel's warnings (`warned`) and figures that were read (`seen`); output is
what must be notified now. A warning that adds nothing to what its recipients know is added to the next one's count.
Figures alone are sufficient, so a lost warning is compensated by the next reading.

Recipients: for a user's quota that user, whichever process wrote. For a group's or project's, the user who wrote, and
the machine's daemon, for administrators. No other user is notified.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from typing import Final, NamedTuple

from upcall.protocols.quota.notice import BELOW, GRACE, NEAR, OVER_HARD, OVER_SOFT, OVER_SOFT_LONG, SPACE
from upcall.protocols.quota.settings import Rules
from upcall.protocols.quota.warning import MEANING, NOTHING, Figures, Warned

SYSTEM: Final = 0  # stands for administrators: their notices go to the machine's daemon, whatever its uid is
MOST_STATES: Final = 16384
_MOST_TOLD = 256  # recorded recipients of one group's or project's quota
_LAST_HOURS = (86400, 3600, 600)  # seconds before the grace period ends; a reminder is due at each, and at half of it

CALM, OVER, HARD, LONG = 0.0, 2.0, 3.0, 4.0  # levels; from 1 to below 2: near a limit, by threshold
_LEVELS = {OVER_SOFT: OVER, OVER_HARD: HARD, OVER_SOFT_LONG: LONG}


class Key(NamedTuple):
    """Identifies one quota of one resource. `kind`: the kernel's quota type; `device`: its device number."""

    device: int
    kind: int
    id: int
    resource: str


class Told(NamedTuple):
    """A notification that is due. `cause`, `warning`: the uid that wrote and the kernel's code, if the kernel has just
    warned."""

    to: tuple[int, ...]
    key: Key
    event: str
    figures: Figures
    cause: int | None
    count: int  # type: ignore[assignment]  # not tuple.count
    warning: int | None = None


class State:
    """The state of one quota that is near or over a limit."""

    __slots__ = ("below_since", "figures", "folded", "level", "look_at", "since", "stage", "told")

    def __init__(self) -> None:
        self.level = CALM
        self.figures = NOTHING
        self.told: dict[int, tuple[float, float]] = {}  # recipient's uid -> (level, when)
        self.folded = 0  # warnings not yet contained in a notification
        self.since = math.inf  # when the running grace period was first seen
        self.stage = -math.inf  # when the last reminder of the grace period was due
        self.below_since = math.inf
        self.look_at = math.inf


class Core:
    """The states of all quotas that are near or over a limit. Not thread-safe."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self._states: dict[Key, State] = {}
        self._times: list[tuple[float, Key]] = []  # when to read which quota again: a heap that may hold stale entries

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, key: Key) -> bool:
        return key in self._states

    # --- input -----------------------------------------------------------------------------------------------

    def warned(self, key: Key, warned: Warned, count: int, figures: Figures | None, now: float) -> list[Told]:
        """Handles a warning that the kernel sent `count` times. `figures`: the current ones; None if they could not be
        read. Returns the notifications that are due."""
        event = MEANING.get(warned.warning, (SPACE, f"kernel-{warned.warning}"))[1]
        state = self._states.get(key)
        if event == BELOW:
            # Notified later, from the figures, and only to recipients of an earlier "over". This also drops the
            # kernel's messages about quotas without limits.
            if state is not None and state.level >= OVER:
                self._look(key, state, now, self.rules.settle)
            return []
        if state is None:
            state = self._begin(key)
        if figures is not None:
            self._note(state, figures, now)
        state.below_since = math.inf
        self._look(key, state, now, self.rules.near_interval)
        people = [warned.excess_id] if key.kind == 0 else [warned.caused_id, SYSTEM]
        told = self._tell(key, state, event, _LEVELS.get(event, OVER), people, now, count)
        return [one._replace(cause=warned.caused_id, warning=warned.warning) for one in told]

    def seen(self, key: Key, figures: Figures, now: float) -> list[Told]:
        """Handles figures that were read. Returns the notifications that are due."""
        level = self._level(figures, now)
        state = self._states.get(key)
        if state is None:
            if level == CALM:
                return []
            state = self._begin(key)
        self._note(state, figures, now)
        self._look(key, state, now, self.rules.near_interval)
        if level < state.level:
            return self._fall(key, state, level, now)
        state.below_since = math.inf
        people = [key.id] if key.kind == 0 else [*state.told, SYSTEM]
        event = {OVER: OVER_SOFT, HARD: OVER_HARD, LONG: OVER_SOFT_LONG}.get(level, NEAR)
        known = level <= state.level
        if known and level in (OVER, HARD):
            return self._escalate(key, state, now)
        return [] if known else self._tell(key, state, event, level, people, now)

    # --- levels ----------------------------------------------------------------------------------------------

    def _level(self, figures: Figures, now: float) -> float:
        used, soft, hard, until = figures
        over = soft and used > soft
        if over and 0 < until <= now:
            return LONG
        if hard and used >= hard:
            return HARD
        if over:
            return OVER
        limit = soft or hard
        crossed = [one for one in self.rules.thresholds if limit and used * 100 >= limit * one]
        return 1 + max(crossed) / 1000 if crossed else CALM

    def _fall(self, key: Key, state: State, level: float, now: float) -> list[Told]:
        """Handles an improvement: it counts only if it lasts (`settle`) and exceeds `hysteresis`."""
        used, soft, hard, _ = state.figures
        limit, room = soft or hard, self.rules.hysteresis
        if state.level < OVER:
            threshold = round((state.level - 1) * 1000)
            if used * 100 < limit * (threshold - room) or not limit:
                self._settle(key, state, level)
            return []
        if level >= OVER:
            return self._escalate(key, state, now)  # below the hard limit, but not yet below the soft one
        if limit and used * 100 > limit * (100 - room):
            state.below_since = math.inf
            return []
        state.below_since = min(state.below_since, now)
        if now < state.below_since + self.rules.settle:
            self._look(key, state, now, state.below_since + self.rules.settle - now)
            return []
        told = Told(tuple(state.told), key, BELOW, state.figures, None, state.folded)
        state.told.clear()
        state.folded = 0
        if level != CALM:  # still near the limit: no notification, they were notified of worse
            state.told = dict.fromkeys(told.to, (level, now))
        self._settle(key, state, level)
        return [told] if told.to else []

    def _settle(self, key: Key, state: State, level: float) -> None:
        state.level = level
        state.told = {uid: (min(level, before), when) for uid, (before, when) in state.told.items()}
        state.below_since = math.inf
        if level == CALM:
            del self._states[key]

    def _note(self, state: State, figures: Figures, now: float) -> None:
        if figures.grace_until != state.figures.grace_until:
            state.since, state.stage = now, -math.inf  # the grace period has begun again, or ended
        state.figures = figures

    # --- notifications ---------------------------------------------------------------------------------------

    def _tell(
        self, key: Key, state: State, event: str, level: float, people: list[int], now: float,
        count: int = 0,
    ) -> list[Told]:  # fmt: skip
        """Returns a notification to those of `people` who do not know this level yet, or were notified of it more than
        `remind` seconds ago."""
        state.level = max(state.level, level)
        state.folded += count
        news = []
        for uid in dict.fromkeys(people):
            before, when = state.told.get(uid, (CALM, -math.inf))
            if level < before or (level == before and now < when + self.rules.remind):
                continue
            state.told.pop(uid, None)
            if len(state.told) >= _MOST_TOLD:
                del state.told[next(iter(state.told))]
            state.told[uid] = level, now
            news.append(uid)
        if not news:
            return []
        state.stage = now  # reminders that were due earlier are superseded
        folded, state.folded = state.folded, 0
        return [Told(tuple(news), key, event, state.figures, None, folded)]

    def _escalate(self, key: Key, state: State, now: float) -> list[Told]:
        """Returns a reminder to all earlier recipients at each stage of the running grace period."""
        if not state.told or not any(max(state.stage, state.since) < stage <= now for stage in _stages(state)):
            return []
        state.stage = now
        folded, state.folded = state.folded, 0
        return [Told(tuple(state.told), key, GRACE, state.figures, None, folded)]

    # --- time ------------------------------------------------------------------------------------------------

    def _look(self, key: Key, state: State, now: float, delay: float) -> None:
        """Schedules the next reading: after `delay`, or at the next stage of the grace period."""
        at = min([now + delay, *(stage for stage in _stages(state) if stage > now)])
        if not now < state.look_at <= at:  # no earlier reading is scheduled
            state.look_at = at
            heapq.heappush(self._times, (at, key))

    def next_wake(self) -> float:
        """Returns the unix time at which `due` has something; inf if never."""
        while self._times:
            at, key = self._times[0]
            state = self._states.get(key)
            if state is not None and state.look_at == at:
                return at
            heapq.heappop(self._times)
        return math.inf

    def due(self, now: float, most: int) -> Iterator[Key]:
        """Yields at most `most` quotas that must be read now. Call `seen` for each, or `later`."""
        while most > 0 and self.next_wake() <= now:
            _, key = heapq.heappop(self._times)
            self._states[key].look_at = math.inf
            most -= 1
            yield key

    def later(self, key: Key, now: float) -> None:
        """Schedules another reading, because the figures could not be read now."""
        state = self._states.get(key)
        if state is not None:
            self._look(key, state, now, self.rules.interval)

    def _begin(self, key: Key) -> State:
        if len(self._states) >= MOST_STATES:
            del self._states[next(iter(self._states))]
        state = self._states[key] = State()
        return state

    # --- over a restart --------------------------------------------------------------------------------------

    def dump(self) -> Iterator[tuple[Key, State]]:
        """Yields all states, to be saved."""
        yield from self._states.items()

    def restore(self, key: Key, state: State, now: float) -> None:
        """Adds a saved state and schedules a reading of the quota."""
        if len(self._states) < MOST_STATES:
            self._states[key] = state
            self._look(key, state, now, 0)


def _stages(state: State) -> list[float]:
    """Returns the times of reminders of a running grace period: half of it, its last hours, its end."""
    until = state.figures.grace_until
    if not until or state.since >= until:
        return []
    return [state.since + (until - state.since) / 2, *(until - left for left in _LAST_HOURS), until]

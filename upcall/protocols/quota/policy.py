"""What people are told about quotas, and when: each thing once, and before it is too late. Pure.

For each quota (whose, on which filesystem, space or files) there is a level: how bad the worst is that was told since
it was last all right. What comes in is the kernel's warnings (`warned`) and the figures as they are (`seen`); what
goes out is what somebody has to be told now. A warning that says no more than its person knows is folded into the next
one. Figures alone are enough for everything, so a warning that the kernel lost is made up for by the next reading.
Times are unix seconds.

Who is told: of a user's quota that user, whoever wrote. Of a group's or project's, the user who wrote, because only he
can know what he did, and the system's daemon, for administrators. Nobody else ever.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from typing import Final, NamedTuple

from upcall.protocols.quota.notice import BELOW, GRACE, NEAR, OVER_HARD, OVER_SOFT, OVER_SOFT_LONG, SPACE
from upcall.protocols.quota.settings import Rules
from upcall.protocols.quota.warning import MEANING, NOTHING, Figures, Warned

SYSTEM: Final = 0  # stands for administrators: the machine's daemon hears what is for them, whatever its uid is
MOST_STATES: Final = 16384
_MOST_TOLD = 256  # people of one group or project whom we know to have been told
_LAST_HOURS = (86400, 3600, 600)  # seconds before the grace is over at which people are told, besides half of it

CALM, OVER, HARD, LONG = 0.0, 2.0, 3.0, 4.0  # levels; 1 and what is up to 2: near, by threshold
_LEVELS = {OVER_SOFT: OVER, OVER_HARD: HARD, OVER_SOFT_LONG: LONG}


class Key(NamedTuple):
    """One quota of one resource. `kind` is the kernel's quota type, `device` its number for the filesystem."""

    device: int
    kind: int
    id: int
    resource: str


class Told(NamedTuple):
    """What these people are to be told now. `cause` and `warning`: who wrote, and the kernel's word for it, if the
    kernel has just said so."""

    to: tuple[int, ...]
    key: Key
    event: str
    figures: Figures
    cause: int | None
    count: int  # type: ignore[assignment]  # not tuple.count
    warning: int | None = None


class State:
    """What is known of one quota that is not all right."""

    __slots__ = ("below_since", "figures", "folded", "level", "look_at", "since", "stage", "told")

    def __init__(self) -> None:
        self.level = CALM
        self.figures = NOTHING
        self.told: dict[int, tuple[float, float]] = {}  # uid -> (level, when)
        self.folded = 0  # warnings that nobody has heard of
        self.since = math.inf  # when the grace that runs was first seen
        self.stage = -math.inf  # the last of its stages that was told
        self.below_since = math.inf
        self.look_at = math.inf


class Core:
    """All quotas that are near a limit or over it."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self._states: dict[Key, State] = {}
        self._times: list[tuple[float, Key]] = []  # when to look at whom: a heap, with entries that are out of date

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, key: Key) -> bool:
        return key in self._states

    # --- what comes in ---------------------------------------------------------------------------------------

    def warned(self, key: Key, warned: Warned, count: int, figures: Figures | None, now: float) -> list[Told]:
        """The kernel has warned, `count` times. `figures`: as they are now, None if they could not be had."""
        event = MEANING.get(warned.warning, (SPACE, f"kernel-{warned.warning}"))[1]
        state = self._states.get(key)
        if event == BELOW:
            # Told after a while, from the figures, and only to those who were told that they are over. What the
            # kernel says of those who have no limit at all is dropped here, too.
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
        """Somebody has looked: these are the figures."""
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
        """It is better than what was told: if it stays so, and by more than a little, that counts."""
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
        if level != CALM:  # they know that they are near: they have just been further
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
            state.since, state.stage = now, -math.inf  # it runs anew, or not at all
        state.figures = figures

    # --- telling ---------------------------------------------------------------------------------------------

    def _tell(
        self, key: Key, state: State, event: str, level: float, people: list[int], now: float,
        count: int = 0,
    ) -> list[Told]:  # fmt: skip
        """To those of them who do not know it yet, or to whom it was said long ago."""
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
        state.stage = now  # what lies before need not be told any more
        folded, state.folded = state.folded, 0
        return [Told(tuple(news), key, event, state.figures, None, folded)]

    def _escalate(self, key: Key, state: State, now: float) -> list[Told]:
        """While the grace runs out, everybody who was told is told again, at each of its stages."""
        if not state.told or not any(max(state.stage, state.since) < stage <= now for stage in _stages(state)):
            return []
        state.stage = now
        folded, state.folded = state.folded, 0
        return [Told(tuple(state.told), key, GRACE, state.figures, None, folded)]

    # --- time ------------------------------------------------------------------------------------------------

    def _look(self, key: Key, state: State, now: float, delay: float) -> None:
        """Says when to look at it again: after `delay`, or when the next stage of its grace comes."""
        at = min([now + delay, *(stage for stage in _stages(state) if stage > now)])
        if not now < state.look_at <= at:  # it will be looked at before anyhow
            state.look_at = at
            heapq.heappush(self._times, (at, key))

    def next_wake(self) -> float:
        """When `due` has something; inf if never."""
        while self._times:
            at, key = self._times[0]
            state = self._states.get(key)
            if state is not None and state.look_at == at:
                return at
            heapq.heappop(self._times)
        return math.inf

    def due(self, now: float, most: int) -> Iterator[Key]:
        """At most so many quotas that have to be looked at now; each must then be `seen`, or `forgotten`."""
        while most > 0 and self.next_wake() <= now:
            _, key = heapq.heappop(self._times)
            self._states[key].look_at = math.inf
            most -= 1
            yield key

    def later(self, key: Key, now: float) -> None:
        """Its figures cannot be had now."""
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
        yield from self._states.items()

    def restore(self, key: Key, state: State, now: float) -> None:
        """A state from before; it is looked at soon."""
        if len(self._states) < MOST_STATES:
            self._states[key] = state
            self._look(key, state, now, 0)


def _stages(state: State) -> list[float]:
    """When a grace that runs is to be spoken of: at half of it, in its last hours, and at its end."""
    until = state.figures.grace_until
    if not until or state.since >= until:
        return []
    return [state.since + (until - state.since) / 2, *(until - left for left in _LAST_HOURS), until]

"""Keeps one token's PIN for a limited time; lets one request at a time try it; limits wrong PINs. Pure."""

from __future__ import annotations

import math

from upcall.kernel.process import LockedMemory

UNTRIED = 60.0  # seconds that a PIN waits for a request that tries it
TRIAL = 10.0  # seconds until a verdict is no longer expected
SHARED = 5.0  # seconds that a PIN is kept for requests that waited for the same prompt, even if PINs are not kept


class Pin:
    """The PIN of one token. Not thread-safe: the owner holds a lock. Times are in seconds of CLOCK_MONOTONIC.

    `who`: identifies the thread that handles a request.
    """

    def __init__(self, budget: int, keep: float) -> None:
        """`budget`: wrong PINs after which no more may be tried. `keep`: seconds to keep a PIN after its first good
        verdict."""
        self._budget, self._keep = budget, keep
        self._secret: LockedMemory | None = None
        self._good = False  # the token has accepted it
        self._until = math.inf  # when it expires
        self._trial: int | None = None  # the thread that tries it
        self._trial_until = 0.0
        self._counted: set[int] = set()  # threads whose trial has counted as wrong, without a verdict
        self._wrong = 0
        self.failures = 0  # wrong PINs since the last good one; `reset` does not clear it

    @property
    def worn_out(self) -> bool:
        """Returns whether the budget of wrong PINs is used up: no more prompts."""
        return self._wrong >= self._budget

    @property
    def left(self) -> int:
        return max(0, self._budget - self._wrong)

    @property
    def idle(self) -> bool:
        """Returns whether the object holds no state: no PIN, trial or wrong PINs."""
        return self._secret is None and self._trial is None and not self.failures

    def put(self, secret: bytearray, now: float) -> None:
        """Stores a PIN that was typed, and wipes the buffer."""
        self.forget()
        self._secret, self._good, self._until = LockedMemory(secret), False, now + UNTRIED

    def take(self, who: int, now: float) -> bytearray | None:
        """Returns the PIN for a trial, which must end with a verdict. None without a PIN, or while one is running."""
        self.ended(who)
        self.expire(now)
        if self._secret is None or self._trial is not None:
            return None
        self._trial, self._trial_until = who, now + TRIAL
        return self._secret.copy()

    @property
    def due(self) -> float | None:
        """Returns when to call `expire` at the latest; None if there is nothing to expire."""
        return None if self._secret is None else max(self._until, self.tried_until or 0.0)

    @property
    def tried_until(self) -> float | None:
        """Returns when the running trial is overdue; None if none is running."""
        return None if self._trial is None else self._trial_until

    def verdict(self, who: int, good: bool, now: float, awaited: bool) -> None:
        """Ends the trial of thread `who`. `good`: the token accepted the PIN. `awaited`: other requests wait for
        it."""
        mine, counted = self._trial == who, who in self._counted
        self._counted.discard(who)
        if mine:
            self._trial = None
        if good:
            self._wrong = self.failures = 0
            if mine and not self._good:
                self._good = True
                self._until = now + max(self._keep, SHARED if awaited else 0.0)
                self.expire(now)
        else:
            self.forget()
            if not counted:
                self._wrong += 1
                self.failures += 1

    def ended(self, who: int) -> None:
        """Ends a trial without a verdict. It counts as wrong, because the token may have counted it so."""
        self._counted.discard(who)
        if self._trial == who:
            self._trial = None
            if not self._good:
                self.forget()
                self._wrong += 1
                self.failures += 1

    def expire(self, now: float) -> None:
        """Ends an overdue trial; wipes an expired PIN."""
        if self._trial is not None and now >= self._trial_until:
            late, untried = self._trial, not self._good
            self.ended(late)
            if untried:
                self._counted.add(late)
        if self._trial is None and now >= self._until:
            self.forget()

    def forget(self) -> None:
        if self._secret is not None:
            self._secret.wipe()
        self._secret, self._good, self._until = None, False, math.inf
        self._trial = None  # a late verdict must not apply to the next PIN

    def reset(self) -> None:
        """Resets the budget of wrong PINs: a person has asked for another attempt."""
        self._wrong = 0

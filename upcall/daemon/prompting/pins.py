"""Keeps one token's PIN for a limited time; lets one request at a time try it; limits wrong PINs. Pure."""

from __future__ import annotations

import math

from upcall.kernel.process import LockedMemory

UNTRIED = 60.0  # seconds that a PIN waits for a request that tries it
TRIAL = 10.0  # seconds until a verdict is no longer expected
SHARED = 5.0  # seconds that a PIN that is not to be kept is there for those who waited for it together


class Pin:
    """Not for several threads: its owner holds a lock. Time is an argument, in monotonic seconds.

    `who`: an identifier of the thread that is at work for a request.
    """

    def __init__(self, budget: int, keep: float) -> None:
        """`budget`: wrong PINs after which there are no more; `keep`: seconds, from the first good verdict on."""
        self._budget, self._keep = budget, keep
        self._secret: LockedMemory | None = None
        self._good = False  # the token has taken it
        self._until = math.inf  # when it is forgotten
        self._trial: int | None = None  # who tries it
        self._trial_until = 0.0
        self._counted: set[int] = set()  # whose trial has counted as wrong already, for want of a verdict
        self._wrong = 0
        self.failures = 0  # wrong ones since the last good one, whatever was reset meanwhile

    @property
    def worn_out(self) -> bool:
        """Returns whether the budget of wrong PINs is used up: no more prompts."""
        return self._wrong >= self._budget

    @property
    def left(self) -> int:
        return max(0, self._budget - self._wrong)

    @property
    def idle(self) -> bool:
        """Whether nothing would be lost with it."""
        return self._secret is None and self._trial is None and not self.failures

    def put(self, secret: bytearray, now: float) -> None:
        """A PIN that was typed; the buffer is wiped."""
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
        """When `expire` has something to do at the latest; None if there is nothing to forget."""
        return None if self._secret is None else max(self._until, self.tried_until or 0.0)

    @property
    def tried_until(self) -> float | None:
        """Returns when the running trial is overdue; None if none is running."""
        return None if self._trial is None else self._trial_until

    def verdict(self, who: int, good: bool, now: float, awaited: bool) -> None:
        """`awaited`: others have waited for the same PIN."""
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
        self._trial = None  # a verdict that still comes is not about the next one

    def reset(self) -> None:
        """Resets the budget of wrong PINs: a person has asked for another attempt."""
        self._wrong = 0

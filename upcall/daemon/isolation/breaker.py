"""Circuit breaker: delays attempts with a failing module, with exponential back-off. Pure: time is an argument, s."""

from __future__ import annotations

from upcall.core.errors import Refused

LIMIT = 3  # failures in a row after which requests are refused instead of delayed
_FIRST, _MOST = 0.1, 5.0


class Breaker:
    """Counts failures in a row. After the first, the next attempt follows at once; later ones are delayed with
    back-off, up to 5 s. From the third on, requests are refused during the delay; after it, one is tried first."""

    def __init__(self) -> None:
        self.failures = 0
        self._next = 0.0  # time of the next attempt
        self._trial = 0.0  # until then, one trial request is running

    def admit(self, now: float, deadline: float) -> float:
        """Returns for how many seconds a request must wait before its attempt. `now`, `deadline`: seconds, monotonic.
        Refused("module-off") if it must not be tried before its deadline."""
        wait = max(0.0, self._next - now)
        if now + wait > deadline:
            raise Refused("module-off")
        if self.failures >= LIMIT:
            if wait or now < self._trial:
                raise Refused("module-off")
            self._trial = deadline
        return wait

    def failed(self, now: float) -> None:
        self.failures += 1
        delay = min(_MOST, _FIRST * 2.0 ** min(self.failures - 2, 16)) if self.failures > 1 else 0.0
        self._next, self._trial = now + delay, 0.0

    def succeeded(self) -> None:
        self.failures, self._next, self._trial = 0, 0.0, 0.0

    def undecided(self) -> None:
        """Ends a trial without a result: another request may be tried."""
        self._trial = 0.0

    def state(self, now: float) -> str:
        """Returns "closed": all requests pass; "off": none does; "trial": one is tried, or may be."""
        if self.failures < LIMIT:
            return "closed"
        return "off" if now < self._next else "trial"

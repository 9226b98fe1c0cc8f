"""When a module that keeps breaking may be tried again. Pure: time is an argument, in seconds."""

from __future__ import annotations

from upcall.core.errors import Refused

LIMIT = 3  # failures in a row after which nobody waits for another try
_FIRST, _MOST = 0.1, 5.0


class Breaker:
    """Counts failures in a row. After one, the next try may follow at once; after a few, it is put off, a little
    longer each time, up to 5 s; from the third on, requests are refused meanwhile and then one goes first."""

    def __init__(self) -> None:
        self.failures = 0
        self._next = 0.0  # not before
        self._trial = 0.0  # until then, one request has gone first

    def admit(self, now: float, deadline: float) -> float:
        """How long a request with this deadline has to wait for its try. Refused("module-off")."""
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
        """Whoever went first learned nothing: another may."""
        self._trial = 0.0

    def state(self, now: float) -> str:
        """closed: all may pass; off: nobody; trial: one has gone first, or may."""
        if self.failures < LIMIT:
            return "closed"
        return "off" if now < self._next else "trial"

"""Listens to logind in a small process beside a user's daemon, and reports when keys must be locked.

    logind -- D-Bus --> signals.py -- one word per datagram, and back --> upcall.protocols.ecryptfs.auto_lock

It is a process of its own, because a D-Bus library must not run in a process that holds passphrases. It can be
restarted without delaying the daemon, and ends with it.

    on CAUSE    all keys must be locked for this cause from now on; the daemon echoes it once they are
    off CAUSE   the cause has ended; the daemon echoes it likewise
    note WORDS  for the daemon's log

At its start it sends `on` or `off` for every cause whose state is known.
"""

from __future__ import annotations

from typing import Final

SUSPEND: Final = "suspend"
SCREEN_LOCK: Final = "screen-lock"
LOGOUT: Final = "logout"
CAUSES: Final = (SUSPEND, SCREEN_LOCK, LOGOUT)
MAX_WORD: Final = 512  # bytes
NO_LOGIND: Final = 69  # the process's exit status if there is no logind (EX_UNAVAILABLE)

"""Listens to logind in a small process beside a user's daemon, and reports when keys must be locked.

    logind -- D-Bus --> watching.py -- one word per datagram, and back --> upcall.protocols.ecryptfs.auto_lock

In a process of its own, because a D-Bus library has no place in one that holds passphrases. It starts, and is started
again, without anybody waiting for it, and ends with the daemon.

    on CAUSE    from now on all keys are to be locked for this; the daemon says the same once they are
    off CAUSE   that is over; likewise
    note WORDS  for the daemon's log

At its start it says `on` or `off` for every cause whose state is known.
"""

from __future__ import annotations

from typing import Final

SUSPEND: Final = "suspend"
SCREEN_LOCK: Final = "screen-lock"
LOGOUT: Final = "logout"
CAUSES: Final = (SUSPEND, SCREEN_LOCK, LOGOUT)
MAX_WORD: Final = 512  # bytes
NO_LOGIND: Final = 69  # the process's exit status: there is nobody to listen to (EX_UNAVAILABLE)

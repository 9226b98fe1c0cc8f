"""Says for people since when, and for which cause, a key is locked."""

from __future__ import annotations

import time

from upcall.protocols.ecryptfs.locks import COMMAND


def cause_in_words(cause: str) -> str:
    """Returns the cause of a lock for people."""
    return "upcall lock" if cause == COMMAND else cause.replace("-", " ")


def since(at: float) -> str:
    """Returns "since 10:04", or with the day if it was not today. `at`: seconds since the epoch."""
    then, today = time.localtime(at), time.localtime()
    return time.strftime("since %H:%M" if then[:3] == today[:3] else "since %Y-%m-%d %H:%M", then)

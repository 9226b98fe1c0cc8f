"""Provides quota notices for tests of sinks."""

from __future__ import annotations

import time
from typing import Any

from upcall.protocols.quota.notice import OVER_HARD, SPACE, USER, Cause, Filesystem, QuotaNotice, Raw, Subject

HOSTILE = "\x1b]0;gotcha\x07\x9b2J\r\nBcc: eve@example.org\n<b>&amp;\u202egro.elpmaxe\x00\u2028\ud800%s{name}"


def notice(uid: int = 5001, name: str = "alice", **changes: Any) -> QuotaNotice:
    """Returns a notice that this user's files on /home have reached the hard limit. `changes`: other fields."""
    made = QuotaNotice(
        event=OVER_HARD,
        resource=SPACE,
        subject=Subject(USER, uid, name),
        cause=Cause(uid, name),
        filesystem=Filesystem("/home", "/dev/vda3", "ext4"),
        used=10 << 30,
        soft=9 << 30,
        hard=10 << 30,
        grace_until=None,
        percent=100,
        at=int(time.time()),
        raw=Raw(0, 4, 254, 3),
    )
    return made._replace(**changes)


def hostile(uid: int = 5001) -> QuotaNotice:
    """Returns a notice whose names contain injections: escape sequences, mail headers, markup."""
    return notice(
        uid,
        HOSTILE,
        cause=Cause(uid, HOSTILE),
        filesystem=Filesystem(f"/mnt/{HOSTILE}", HOSTILE, HOSTILE),
        event="digest",
    )

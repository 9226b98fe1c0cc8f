"""How bad a notice is, and the few words that say it before the sentence does."""

from __future__ import annotations

from typing import Final

from upcall.protocols.quota.notice import (
    BELOW,
    DIGEST,
    FILES,
    GRACE,
    NEAR,
    OVER_HARD,
    OVER_SOFT,
    OVER_SOFT_LONG,
    TEST,
    USER,
    QuotaNotice,
)

LOW, NORMAL, CRITICAL = range(3)  # as desktops count urgency

_URGENCY: Final = {OVER_HARD: CRITICAL, OVER_SOFT_LONG: CRITICAL, BELOW: LOW, TEST: LOW}
_HEADLINES: Final = {
    OVER_HARD: "Quota used up",
    OVER_SOFT_LONG: "Quota exceeded for too long",
    OVER_SOFT: "Quota exceeded",
    GRACE: "Quota exceeded, and time is running out",
    NEAR: "Quota nearly used up",
    BELOW: "Quota in order again",
    DIGEST: "Several quota warnings",
    TEST: "A test of the quota warnings",
}


def urgency(notice: QuotaNotice) -> int:
    return _URGENCY.get(notice.event, NORMAL)


def headline(notice: QuotaNotice) -> str:
    """A title, without anything in it that comes from outside."""
    text = _HEADLINES.get(notice.event, "Quota warning")
    return text.replace("Quota", "Quota of files", 1) if notice.resource == FILES else text


def person(notice: QuotaNotice) -> tuple[int, str]:
    """(uid, name) of whom it is for: who has the quota, or of a group's or project's, who wrote; root if nobody knows.
    The name may hold anything."""
    if notice.subject.kind == USER:
        return notice.subject.id, notice.subject.name
    if notice.cause.uid is None:
        return 0, "root"
    return notice.cause.uid, notice.cause.name or str(notice.cause.uid)

"""Determines a notice's urgency, headline and recipient."""

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

LOW, NORMAL, CRITICAL = range(3)  # urgency levels of the notification specification

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
    """Returns a title from fixed texts only, without names."""
    text = _HEADLINES.get(notice.event, "Quota warning")
    return text.replace("Quota", "Quota of files", 1) if notice.resource == FILES else text


def person(notice: QuotaNotice) -> tuple[int, str]:
    """Returns (uid, name) of the recipient: the owner of a user quota; for group and project quotas the user who
    wrote, or root if that is unknown. The name is not validated."""
    if notice.subject.kind == USER:
        return notice.subject.id, notice.subject.name
    if notice.cause.uid is None:
        return 0, "root"
    return notice.cause.uid, notice.cause.name or str(notice.cause.uid)

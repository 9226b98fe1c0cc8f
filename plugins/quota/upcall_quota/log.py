"""Writes notices to systemd's journal, with structured fields; without a journal, to the daemon's log."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from upcall.core.errors import ModuleFailed
from upcall.kernel.journal import JOURNAL, send
from upcall.process.log import EventLog
from upcall.protocols.quota.notice import QuotaNotice
from upcall.sink import Sink, TryLater
from upcall_quota.words import CRITICAL, LOW, NORMAL, urgency

MESSAGE_ID: Final = "c1c28c7101394a769e7ef097e1caf01d"  # identifies quota warnings in the journal; must not change
_PRIORITY: Final = {LOW: 6, NORMAL: 5, CRITICAL: 4}  # info, notice, warning (syslog(3))


class Log:
    """A sink that writes to the journal's socket `path`, or to `fallback` if there is no journal."""

    def __init__(self, path: Path, fallback: EventLog | None = None) -> None:
        self._path, self._fallback = path, fallback

    def tell(self, notice: QuotaNotice, text: str, /) -> None:
        try:
            send(self._path, _fields(notice, text))
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
            self._write(notice, text)
        except OSError as error:
            later = TryLater if error.errno in (errno.EAGAIN, errno.ENOBUFS) else ModuleFailed
            raise later(f"the journal takes nothing: {error.strerror}") from error

    def _write(self, notice: QuotaNotice, text: str) -> None:
        if self._fallback is None:
            self._fallback = EventLog("upcall-quota")
        named = {key.lower(): value for key, value in _about(notice)}
        self._fallback("quota", **named, text=text)

    def close(self) -> None:
        if self._fallback is not None:
            self._fallback.flush()


def _about(notice: QuotaNotice) -> list[tuple[str, object]]:
    """Returns the fields of a notice as (name, value), without unknown ones."""
    subject, cause, where = notice.subject, notice.cause, notice.filesystem
    fields: list[tuple[str, object]] = [
        ("EVENT", notice.event), ("RESOURCE", notice.resource),
        ("SUBJECT_KIND", subject.kind), ("SUBJECT_ID", subject.id), ("SUBJECT_NAME", subject.name),
        ("CAUSE_UID", cause.uid), ("CAUSE_NAME", cause.name),
        ("MOUNT", where.mount), ("DEVICE", where.device), ("FILESYSTEM", where.type),
        ("USED", notice.used), ("SOFT", notice.soft), ("HARD", notice.hard), ("PERCENT", notice.percent),
        ("GRACE_UNTIL", notice.grace_until), ("COUNT", notice.count), ("LOST", notice.lost),
    ]  # fmt: skip
    return [(key, value) for key, value in fields if value is not None]


def _fields(notice: QuotaNotice, text: str) -> list[tuple[str, object]]:
    return [
        ("MESSAGE", text),
        ("MESSAGE_ID", MESSAGE_ID),
        ("PRIORITY", _PRIORITY[urgency(notice)]),
        ("SYSLOG_IDENTIFIER", "upcall-quota"),
        *((f"QUOTA_{key}", value) for key, value in _about(notice)),
    ]


class LogModule:
    name = "log"

    def open(self, settings: Mapping[str, Any], /) -> Sink:
        return Log(JOURNAL)


sink = LogModule()

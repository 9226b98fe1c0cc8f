"""Packs and parses quota notices, the body of a NOTICE of the service "quota", and formats them for people.

One JSON object. Sizes are bytes, or inodes where `resource` is "files"; a limit of 0 is none; times are unix seconds.

    version 1, event, resource "space" | "files", subject {kind "user" | "group" | "project", id, name},
    cause {uid | null, name | null}, filesystem {mount | null, device, type}, used, soft, hard,
    grace_until | null, percent | null, at, count (kernel warnings in this notice), lost (messages of the kernel
    lost before it), raw [qtype, warning, major, minor] | null (the kernel's own numbers, if it has just warned)

Unknown events are kept and unknown fields are ignored, because a newer source may send more. Names are untrusted and
may contain any character; `sentence` and `printable` escape them.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from upcall.core.errors import PeerError

SERVICE: Final = "quota"
VERSION: Final = 1
MAX_TEXT: Final = 4096  # characters: a path
MAX_EVENT: Final = 64
MAX_NUMBER: Final = (1 << 64) - 1
MAX_ID: Final = (1 << 32) - 1

OVER_HARD, OVER_SOFT_LONG, OVER_SOFT = "over-hard", "over-soft-long", "over-soft"
NEAR, GRACE, BELOW, DIGEST, TEST = "near", "grace", "below", "digest", "test"
EVENTS: Final = (OVER_HARD, OVER_SOFT_LONG, OVER_SOFT, NEAR, GRACE, BELOW, DIGEST, TEST)

SPACE, FILES = "space", "files"
USER, GROUP, PROJECT = KINDS = ("user", "group", "project")  # in the order of the kernel's quota types

_WHAT = "quota notice"


class Subject(NamedTuple):
    """The owner of the quota. `name`: the number as text if it has no name."""

    kind: str
    id: int
    name: str


class Cause(NamedTuple):
    """The uid that wrote, and its name; None if unknown."""

    uid: int | None = None
    name: str | None = None


class Filesystem(NamedTuple):
    """A filesystem: mount point (None if it is not mounted in this mount namespace), device, type."""

    mount: str | None
    device: str
    type: str


class Raw(NamedTuple):
    """The kernel's numbers in a warning, for programs that interpret them themselves."""

    qtype: int
    warning: int
    major: int
    minor: int


class QuotaNotice(NamedTuple):
    """One notice; its fields are described above."""

    event: str
    resource: str
    subject: Subject
    cause: Cause
    filesystem: Filesystem
    used: int
    soft: int
    hard: int
    grace_until: int | None
    percent: int | None
    at: int
    count: int = 1  # type: ignore[assignment]  # not tuple.count
    lost: int = 0
    raw: Raw | None = None


def pack(notice: QuotaNotice) -> bytes:
    """Returns the body. PeerError if `take` would reject it."""
    fields: dict[str, Any] = {"version": VERSION, **notice._asdict()}
    for part in ("subject", "cause", "filesystem"):
        fields[part] = fields[part]._asdict()
    _taken(fields)
    return json.dumps(fields, separators=(",", ":")).encode("ascii")


def take(body: bytes) -> QuotaNotice:
    """Parses a body. PeerError if it is malformed."""
    try:
        fields = json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise PeerError(_WHAT, "is not JSON as this notice uses it") from None
    return _taken(fields)


def _refuse(what: str) -> None:
    raise ValueError(what)


def _taken(fields: object) -> QuotaNotice:
    if not isinstance(fields, dict):
        raise PeerError(_WHAT, "is not a JSON object")
    version = _number(fields, "version")
    if version != VERSION:
        raise PeerError(_WHAT, f"version {version}, {VERSION} is known")
    subject, cause, where = (_object(fields, name) for name in ("subject", "cause", "filesystem"))
    return QuotaNotice(
        event=_text(fields, "event", MAX_EVENT),
        resource=_one_of(fields, "resource", (SPACE, FILES)),
        subject=Subject(_one_of(subject, "kind", KINDS), _number(subject, "id", MAX_ID), _text(subject, "name")),
        cause=Cause(_number_or_none(cause, "uid", MAX_ID), _text_or_none(cause, "name")),
        filesystem=Filesystem(_text_or_none(where, "mount"), _text(where, "device"), _text(where, "type")),
        used=_number(fields, "used"),
        soft=_number(fields, "soft"),
        hard=_number(fields, "hard"),
        grace_until=_number_or_none(fields, "grace_until"),
        percent=_number_or_none(fields, "percent"),
        at=_number(fields, "at"),
        count=_number(fields, "count"),
        lost=_number(fields, "lost"),
        raw=_raw(fields.get("raw")),
    )


def _object(fields: dict[str, Any], key: str) -> dict[str, Any]:
    value = fields.get(key)
    if not isinstance(value, dict):
        raise PeerError(_WHAT, f"{key} is not an object")
    return value


def _number(fields: dict[str, Any], key: str, most: int = MAX_NUMBER) -> int:
    value = fields.get(key)
    if type(value) is not int or not 0 <= value <= most:
        raise PeerError(_WHAT, f"{key} is not a whole number from 0 to {most}")
    return value


def _raw(value: object) -> Raw | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple) or [type(one) for one in value] != [int] * 4:
        raise PeerError(_WHAT, "raw is not four whole numbers")
    if not all(0 <= one <= MAX_ID for one in value):
        raise PeerError(_WHAT, f"raw is not four numbers from 0 to {MAX_ID}")
    return Raw(*value)


def _number_or_none(fields: dict[str, Any], key: str, most: int = MAX_NUMBER) -> int | None:
    return None if key in fields and fields[key] is None else _number(fields, key, most)


def _text(fields: dict[str, Any], key: str, most: int = MAX_TEXT) -> str:
    value = fields.get(key)
    if not isinstance(value, str) or len(value) > most:
        raise PeerError(_WHAT, f"{key} is not a text of at most {most} characters")
    return value


def _text_or_none(fields: dict[str, Any], key: str) -> str | None:
    return None if key in fields and fields[key] is None else _text(fields, key)


def _one_of(fields: dict[str, Any], key: str, known: tuple[str, ...]) -> str:
    value = fields.get(key)
    if not isinstance(value, str) or value not in known:
        raise PeerError(_WHAT, f"{key} is none of {', '.join(known)}")
    return value


# --- text for people -----------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """Returns the text with unprintable characters escaped: one line, without control sequences for terminals."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def amount(number: int, resource: str) -> str:
    """Formats a figure: "1.5 GiB", "1,234 files". `number`: bytes, or inodes if `resource` is FILES."""
    if resource == FILES:
        return f"{number:,} file" + ("" if number == 1 else "s")
    if number < 1024:
        return f"{number} byte" + ("" if number == 1 else "s")
    units = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    power = next((p for p in range(1, len(units)) if round(number / 1024**p, 1) < 1024), len(units))
    return f"{number / 1024**power:.1f}".removesuffix(".0") + f" {units[power - 1]}"


def duration(seconds: float) -> str:
    """Formats a duration in one unit: "3 days", "1 hour"."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            number = int(seconds / length + 0.5)
            return f"{number} {unit}" + ("" if number == 1 else "s")
    return "less than a minute"


def moment(when: int) -> str:
    """Formats a time in unix seconds, in this machine's time zone."""
    try:
        return datetime.fromtimestamp(when, UTC).astimezone().strftime("%a %d %b %Y, %H:%M")
    except (ValueError, OverflowError, OSError):
        return "a time that no calendar has"


def place(filesystem: Filesystem) -> str:
    """Returns the mount point of the filesystem, or its device if it is not mounted."""
    return printable(filesystem.mount or filesystem.device)


def sentence(notice: QuotaNotice, now: float, reader: int | None = None) -> str:
    """Describes the notice in one or two sentences: where, how much, what to do. `now`: unix seconds. `reader`: the
    uid that reads it, if known."""
    use, event = _use(notice, reader), notice.event
    files = notice.resource == FILES
    do, end = ("Delete files", "no more files can be made") if files else (
        "Delete or move files", "nothing more can be written")  # fmt: skip
    soft, hard = (amount(limit, notice.resource) if limit else "" for limit in (notice.soft, notice.hard))
    if event == TEST:
        return f"This is a test of the quota warnings for {place(notice.filesystem)}. Nothing has to be done."
    if event == BELOW:
        return f"{use}{', which is' if _known(notice) else ''} below the limit again. Nothing has to be done."
    if event == OVER_HARD:
        return f"{use}{f', the limit is {hard}' if hard else ''}: {end}. {do} to go on."
    if event == OVER_SOFT_LONG:
        back = f" until they are below {soft}" if soft else ""
        return f"{use}, and the time to get below the limit is over: {end}{back}. {do}."
    if event in (OVER_SOFT, GRACE):
        limit = f", over the limit of {soft}" if soft else ", over their limit"
        return f"{use}{limit}. {do}; {_until(notice.grace_until, now)} {end}."
    allowed = f" of {soft or hard} that are allowed" if soft or hard else ""
    if event == NEAR:
        share = "" if notice.percent is None else f" ({notice.percent} %)"
        return f"{use}{allowed}{share}. {do} before the limit is reached."
    what = f"There were {notice.count} quota warnings in a short time" if event == DIGEST else (
        f"Quota event {printable(event)!r}")  # fmt: skip
    return f"{what}. {use}{allowed}: look with `upcall quota status`."


def _use(notice: QuotaNotice, reader: int | None) -> str:
    subject, used = notice.subject, amount(notice.used, notice.resource)
    mine = subject.kind == USER and subject.id == reader
    whose = "Your files" if mine else f"The files of {subject.kind} {printable(subject.name)}"
    verb = f"number {notice.used:,}" if notice.resource == FILES else f"take up {used}"
    if not _known(notice):
        verb = "are" if notice.event == BELOW else "have met their limit"
    return f"{whose} on {place(notice.filesystem)} {verb}"


def _known(notice: QuotaNotice) -> bool:
    """Returns whether the notice has figures. It has none if the filesystem could not be read."""
    return any((notice.used, notice.soft, notice.hard))


def _until(when: int | None, now: float) -> str:
    if when is None:
        return "when the time of grace is over,"
    return f"after {moment(when)} ({f'in {duration(when - now)}' if when > now else 'now'})"

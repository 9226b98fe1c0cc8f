"""What a check finds. Pure."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

OK: Final = "ok"
NOTE: Final = "note"  # worth knowing; somebody may want it so
PROBLEM: Final = "problem"


class Finding(NamedTuple):
    """`what` was found; `remedy` in words; `command` for a shell mends it, if a command can."""

    state: str
    what: str
    remedy: str = ""
    command: str = ""

    def report(self) -> dict[str, Any]:
        return self._asdict()


def ok(what: str) -> Finding:
    return Finding(OK, what)


def note(what: str, remedy: str = "", command: str = "") -> Finding:
    return Finding(NOTE, what, remedy, command)


def problem(what: str, remedy: str = "", command: str = "") -> Finding:
    return Finding(PROBLEM, what, remedy, command)

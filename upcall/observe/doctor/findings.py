"""Defines the findings of a check. Pure."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

OK: Final = "ok"
NOTE: Final = "note"  # worth knowing, may be intended
PROBLEM: Final = "problem"


class Finding(NamedTuple):
    """`what` was found; `remedy` in words; `command`: a shell command that fixes it, or ""."""

    state: str
    what: str
    remedy: str = ""
    command: str = ""

    def report(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return self._asdict()


def ok(what: str) -> Finding:
    """Makes a finding without a fault."""
    return Finding(OK, what)


def note(what: str, remedy: str = "", command: str = "") -> Finding:
    """Makes a finding that may be intended."""
    return Finding(NOTE, what, remedy, command)


def problem(what: str, remedy: str = "", command: str = "") -> Finding:
    """Makes a finding about a fault."""
    return Finding(PROBLEM, what, remedy, command)

"""Determines which line of request-key's configuration answers for a key, and whether it can work."""

from __future__ import annotations

from typing import Any, NamedTuple

from upcall.protocols.request_key.conf import BadLine, Line, RequestedKey, choose
from upcall.protocols.request_key.install.our_file import is_upcalls
from upcall.protocols.request_key.install.system import System
from upcall.protocols.request_key.key_types import KEY_TYPES


class Standing(NamedTuple):
    """The line that applies to a key (None: none matches), and its problems, for people."""

    key: RequestedKey
    line: Line | None
    problems: tuple[str, ...]

    @property
    def ours(self) -> bool:
        return self.line is not None and is_upcalls(self.line.path)

    def report(self) -> dict[str, Any]:
        """Returns plain data for JSON: type, description, callout, line, ours, problems."""
        line = self.line
        return {
            **{name: text.decode(errors="backslashreplace") for name, text in self.key._asdict().items()},
            "line": None if line is None else {"file": line.path, "number": line.number, "program": line.program},
            "ours": self.ours,
            "problems": list(self.problems),
        }


def standing(system: System, key: RequestedKey) -> Standing:
    """Returns the standing of one key. OSError if the configuration cannot be read."""
    try:
        line = choose(system.lines(), key)
    except BadLine as error:
        return Standing(key, None, (str(error),))
    if line is None:
        return Standing(key, None, ("no line fits: the kernel refuses it",))
    words = line.command.removeprefix(b"|").decode(errors="backslashreplace").split()
    programs = words[:1] + [word for word in words[1:] if is_upcalls(line.path) and word.startswith("/")]
    return Standing(key, line, tuple(filter(None, map(system.distrust, programs))))


def standing_of_type(system: System, name: str) -> Standing:
    """Returns the standing of a key type, by its typical keys: the first that has a problem or that another program
    answers; without one, the first. OSError."""
    found = [standing(system, key) for key in KEY_TYPES[name].typical]
    return next((one for one in found if one.problems or not one.ours), found[0])

"""Parses request-key's configuration as request-key 1.6.3 does, and chooses the line for a key. Pure.

    # operation  type         description  callout  program and arguments
    create       cifs.spnego  *            *        /usr/sbin/cifs.upcall %k

A pattern has at most one wildcard, its first `*`. Its wildness is the number of characters that the wildcard matches;
0 without one. The line with the least wildness of operation, then type, description and callout applies; of equal
ones the first that is read. A malformed line makes request-key fail, whatever the other lines are. But a line is read
only up to the first column that does not match.
Source: request-key.c of keyutils, and request-key.conf(5).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from upcall.core.errors import UpcallError

OPERATION = b"create"
MAX_LINE = 4095  # bytes, the newline included
MAX_ARGUMENTS = 253

_BUFFER = 4097  # size of request-key's fgets() buffer
_SPACE = b" \t\n\v\f\r"  # isspace() in the C locale
_MACROS = b"oktdcugTPS"
_COLUMNS = ("operation", "type", "description", "callout")

Wildness = tuple[int, ...]  # of the four columns


class BadLine(UpcallError):
    """A malformed line, on which request-key fails. `why`: the reason, for people."""

    def __init__(self, path: str, number: int, why: str) -> None:
        self.path, self.number, self.why = path, number, why
        super().__init__(f"{path}: line {number}: {why}; request-key gives up on it")


class RequestedKey(NamedTuple):
    """The columns of a request that a line must match."""

    type: bytes
    description: bytes
    callout: bytes = b""


class Line(NamedTuple):
    """A line that is not blank or a comment. `columns`: those of the four that end with a space."""

    path: str
    number: int
    columns: tuple[bytes, ...]
    command: bytes
    fault: str = ""  # why request-key cannot parse the line; "" if it can

    def __str__(self) -> str:
        return f"{self.path}:{self.number}"

    @property
    def program(self) -> str:
        """The path of the program as written; without the bar of a pipe."""
        return (self.command.removeprefix(b"|").split(None, 1) or [b""])[0].decode(errors="backslashreplace")


def lines(path: str, data: bytes) -> Iterator[Line]:
    """Yields the lines of a file that are neither blank nor comments. `path`: for messages only."""
    at = number = 0
    while at < len(data):
        end = data.find(b"\n", at, at + _BUFFER) + 1 or at + _BUFFER
        text = data[at:end].split(b"\0", 1)[0]
        at, number = end, number + 1
        if len(text) > MAX_LINE:
            yield Line(path, number, (), b"", f"is longer than {MAX_LINE - 1} bytes")
        elif not text:
            yield Line(path, number, (), b"", "begins with a NUL")
        elif len(text) > 1 and text[0] not in b"#" + _SPACE:
            columns, command = _split(text[:-1])  # request-key drops the last byte without checking for a newline
            yield Line(path, number, columns, command)


def _split(text: bytes) -> tuple[tuple[bytes, ...], bytes]:
    columns: list[bytes] = []
    while len(columns) < len(_COLUMNS):
        word = text.split(None, 1)[0] if text else b""
        if len(word) == len(text):
            return tuple(columns), b""
        columns.append(word)
        text = text[len(word) :].lstrip(_SPACE)
    return tuple(columns), text


def wildness_of(pattern: bytes, text: bytes) -> int | None:
    """Returns how many characters the pattern's wildcard matches; None if the pattern does not match."""
    if b"*" not in pattern:
        return 0 if pattern == text else None
    head, tail = _ends(pattern)
    skipped = len(text) - (len(pattern) - 1)
    return skipped if skipped >= 0 and text.startswith(head) and text.endswith(tail) else None


def _ends(pattern: bytes) -> tuple[bytes, bytes]:
    """Returns the prefix and suffix that a text must have to match a pattern with a wildcard.

    If the wildcard is neither first nor last, request-key compares the text's end with the pattern's *beginning*.
    """
    head, _, tail = pattern.partition(b"*")
    return head, pattern[: len(tail)] if head else tail


def wildness(line: Line, key: RequestedKey) -> Wildness | None:
    """Returns the wildness of a line's match, by column. None if it does not match. BadLine if request-key would fail
    on this line."""
    if line.fault:
        raise BadLine(line.path, line.number, line.fault)
    found: list[int] = []
    for number, text in enumerate((OPERATION, *key)):
        if number == len(line.columns):
            raise BadLine(line.path, line.number, f"ends at its {_COLUMNS[number]}")
        skipped = wildness_of(line.columns[number], text)
        if skipped is None:
            return None
        found.append(skipped)
    if not line.command:
        raise BadLine(line.path, line.number, "names no program")
    return tuple(found)


def choose(read: Iterable[Line], key: RequestedKey) -> Line | None:
    """Returns the line that applies to a key; None if none matches. `read`: all lines, in the order in which
    request-key reads them. BadLine if request-key would fail on one of them."""
    best: Line | None = None
    least: Wildness = ()
    for line in read:
        found = wildness(line, key)
        if found is not None and (best is None or found < least):
            best, least = line, found
    if best is not None and (why := command_fault(best.command)):
        raise BadLine(best.path, best.number, why)
    return best


def command_fault(command: bytes) -> str:
    """Returns why request-key cannot run this command, or "". Does not check that keys of %{type:description} exist:
    request-key looks them up when it runs the command."""
    words = command.removeprefix(b"|").split()
    if command[1:2].isspace() or b"/" not in b"".join(words[:1]):
        return "the program has no path"
    if len(words) - 1 > MAX_ARGUMENTS:
        return f"more than {MAX_ARGUMENTS} arguments"
    bad = next((word for word in words[1:] if not _is_argument(word)), None)
    return "" if bad is None else f"{bad.decode(errors='backslashreplace')} is no macro"


def _is_argument(word: bytes) -> bool:
    """Accepts %k and the like, %%..., and %{type:description}. Longer words after a % are literal."""
    if word[:1] != b"%" or word[:2] == b"%%":
        return True
    if len(word) <= 2:
        return len(word) == 2 and word[1] in _MACROS
    if word[:2] != b"%{":
        return True
    kind, colon, rest = word[2:].partition(b":")
    return bool(kind and colon and rest.endswith(b"}") and 0 < rest.index(b"}") == len(rest) - 1)


def narrower(line: Line, kind: bytes, description: bytes) -> bool:
    """Returns whether a key of type `kind` can match both the pattern `description` and this line's pattern, and this
    line's is the less wild one."""
    if len(line.columns) < 3 or any(
        wildness_of(pattern, text) != 0 for pattern, text in zip(line.columns, (OPERATION, kind), strict=False)
    ):
        return False
    theirs = line.columns[2]
    if b"*" not in theirs:
        return wildness_of(description, theirs) is not None
    (head, tail), (before, after) = _ends(theirs), _ends(description)
    return (
        len(theirs) > len(description)
        and (head.startswith(before) or before.startswith(head))
        and (tail.endswith(after) or after.endswith(tail))
    )

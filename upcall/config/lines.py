"""Finds the line numbers of the keys of a TOML file, which tomllib does not report. Pure.

It is no validating parser: tomllib has accepted the text, so it only finds keys and the ends of values.
"""

from __future__ import annotations

import contextlib
import re
from bisect import bisect_left
from typing import Final

Path = tuple[str, ...]  # names of the enclosing tables, the outermost first, and of the key

_BARE: Final = re.compile(r"[A-Za-z0-9_-]+")
_QUOTED: Final = re.compile(r'"((?:\\.|[^"\\\n])*)"')
_LITERAL: Final = re.compile(r"'([^'\n]*)'")
_ESCAPE: Final = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))")
_ESCAPED: Final = {"b": "\b", "t": "\t", "n": "\n", "f": "\f", "r": "\r"}
_SPACE: Final = re.compile(r"[ \t]*")
_BLANK: Final = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_BETWEEN: Final = re.compile(r"(?:[ \t\r\n,]|#[^\n]*)*")  # values in an array, or pairs in an inline table
_VALUES: Final = (
    re.compile(r'"""(?:\\.|[^\\])*?"""(?:"{0,2})', re.DOTALL),  # the last three quotes of up to five end it
    re.compile(r"'''.*?'''(?:'{0,2})", re.DOTALL),
    _QUOTED,
    _LITERAL,
    re.compile(r"[^,\]}#\n]+"),  # numbers, booleans and dates, which may have a blank in them
)


def lines(text: str) -> dict[Path, int]:
    """Returns the line, from 1, in which each key and each table is first named. Those that cannot be found are
    omitted."""
    scan = _Scan(text)
    with contextlib.suppress(ValueError, RecursionError):  # lines found before the error are right
        scan.whole()
    return scan.found


def dotted(text: str) -> Path:
    """Parses a path written as in TOML: a."b.c".d. ValueError if it is malformed."""
    scan = _Scan(text)
    path = scan.key(())
    if scan.at != len(text):
        raise ValueError(f"{text!r} is not the name of a key")
    return path


def spelled(path: Path) -> str:
    """Returns the path as written in TOML."""
    return ".".join(name if _BARE.fullmatch(name) else _quoted(name) for name in path)


def _quoted(name: str) -> str:
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'


class _Scan:
    def __init__(self, text: str) -> None:
        self._text, self.at = text, 0
        self._ends = [match.start() for match in re.finditer("\n", text)]
        self.found: dict[Path, int] = {}

    def whole(self) -> None:
        table: Path = ()
        self._match(_BLANK)
        while self.at < len(self._text):
            if self._text[self.at] == "[":
                brackets = 2 if self._text.startswith("[[", self.at) else 1
                self.at += brackets
                table = self.key(())
                self.at += brackets
            else:
                self._pair(table)
            self._match(_BLANK)

    def key(self, above: Path) -> Path:
        """Parses a dotted key and the blanks around it."""
        while True:
            self._match(_SPACE)
            line = bisect_left(self._ends, self.at) + 1
            above = (*above, self._name())
            self.found.setdefault(above, line)
            self._match(_SPACE)
            if not self._text.startswith(".", self.at):
                return above
            self.at += 1

    def _name(self) -> str:
        if match := self._match(_BARE):
            return match[0]
        if match := self._match(_QUOTED):
            return _ESCAPE.sub(_unescaped, match[1])
        if match := self._match(_LITERAL):
            return match[1]
        raise ValueError(f"no key at character {self.at}")

    def _pair(self, table: Path) -> None:
        path = self.key(table)
        if not self._text.startswith("=", self.at):
            raise ValueError(f"no = at character {self.at}")
        self.at += 1
        self._match(_SPACE)
        self._value(path)

    def _value(self, path: Path) -> None:
        opening = self._text[self.at : self.at + 1]
        if opening not in ("[", "{"):
            if not any(self._match(pattern) for pattern in _VALUES):
                raise ValueError(f"no value at character {self.at}")
            return
        self.at += 1
        self._match(_BETWEEN)
        while not self._text.startswith("]" if opening == "[" else "}", self.at):
            if opening == "[":
                self._value(path)
            else:
                self._pair(path)
            self._match(_BETWEEN)
        self.at += 1

    def _match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        match = pattern.match(self._text, self.at)
        if match is not None:
            self.at = match.end()
        return match


def _unescaped(match: re.Match[str]) -> str:
    code = match[1] or match[2]
    return chr(int(code, 16)) if code else _ESCAPED.get(match[3], match[3])

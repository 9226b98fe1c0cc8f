"""Formats pages for man(7). Text is escaped: none of its characters is interpreted as a request.

Groff and mandoc accept the result without warnings, which tests/test_manual.py checks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NamedTuple


class Paragraph(NamedTuple):
    """A paragraph. Text between backticks becomes bold."""

    text: str


class Items(NamedTuple):
    """Terms with descriptions. A term consists of parts: `*bold*`, `/italic/`, or plain."""

    items: tuple[tuple[tuple[str, ...], str], ...]


class Verbatim(NamedTuple):
    """Literal lines, for examples."""

    text: str


Block = Paragraph | Items | Verbatim


class Page(NamedTuple):
    """A manual page."""

    name: str
    section: int
    brief: str  # the line in NAME, which apropos(1) shows
    body: tuple[tuple[str, tuple[Block, ...]], ...]  # (heading, content)

    @property
    def file(self) -> str:
        """The path below a folder of manual pages."""
        return f"man{self.section}/{self.name}.{self.section}"


# Characters that roff would interpret or replace typographically: pasted text must work as shown.
_SPECIAL: Final = {"\\": r"\e", "-": r"\-", "'": r"\(aq", "`": r"\(ga", "^": r"\(ha", "~": r"\(ti", '"': r"\(dq"}
_CODE: Final = re.compile(r"`([^`]+)`")
_FONTS: Final = {"*": r"\fB", "/": r"\fI"}


def escaped(text: str) -> str:
    """Returns one line that roff does not interpret, wherever it is placed."""
    line = "".join(_SPECIAL.get(c, c if c.isascii() else rf"\[u{ord(c):04X}]") for c in text)
    return rf"\&{line}" if line.startswith(".") else line


def words(text: str) -> str:
    """Returns the same with text between backticks in bold; white space becomes single blanks."""
    parts = _CODE.split(" ".join(text.split()))
    line = "".join(rf"\fB{escaped(part)}\fR" if at % 2 else escaped(part) for at, part in enumerate(parts))
    return rf"\&{line}" if line.startswith(".") else line


def render(page: Page, version: str, date: str = "") -> str:
    """Returns the page's source. `date`: for display; without one the result is reproducible."""
    title, source = escaped(page.name.upper()), escaped(f"upcall {version}")
    lines = [f'.TH {title} {page.section} "{date}" "{source}" "upcall manual"']
    lines += [".nh", ".ad l", ".SH NAME"]  # no hyphenation: a broken name cannot be copied
    lines.append(rf"{escaped(page.name)} \- {words(page.brief)}")
    for heading, blocks in page.body:
        lines.append(f".SH {escaped(heading)}")
        for at, block in enumerate(blocks):
            lines += _block(block, first=at == 0)
    return "\n".join(lines) + "\n"


def _block(block: Block, first: bool) -> Iterable[str]:
    match block:
        case Paragraph(text):
            return [words(text)] if first else [".PP", words(text)]
        case Items(items):
            return [line for term, text in items for line in (".TP", "".join(map(_part, term)), words(text))]
        case Verbatim(text):
            shown = [escaped(line) for line in text.splitlines()]
            return [".RS 4" if first else ".PP\n.RS 4", ".nf", *shown, ".fi", ".RE"]


def _part(part: str) -> str:
    if len(part) > 2 and part[0] == part[-1] and part[0] in _FONTS:
        return rf"{_FONTS[part[0]]}{escaped(part[1:-1])}\fR"
    return escaped(part)


def bold(text: str) -> str:
    """Marks a part of a term as bold."""
    return f"*{text}*"


def italic(text: str) -> str:
    """Marks a part of a term as italic."""
    return f"/{text}/"

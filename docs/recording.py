"""Runs `upcall demo` and writes what it prints as an animated SVG, line by line at the times at which it came.

    make recording
    .venv/bin/python docs/recording.py frame.svg --at 6     # as it looks after six seconds, without animation

Pauses longer than `_PAUSE` are cut. Programs that do not animate SVG, and people who do not want motion, see the end.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import time
from pathlib import Path
from typing import Final, NamedTuple
from xml.sax.saxutils import escape

from rich.text import Text

_COMMAND: Final = ["upcall", "--color", "always", "demo"]
_SHOWN: Final = "upcall demo"  # as a person types it
_TYPING, _PAUSE, _HOLD = 0.09, 1.6, 6.0  # seconds: per character; the longest pause; at the end
_COLUMNS: Final = 92
_SIZE, _CELL, _LINE = 14.0, 8.43, 18.0  # pixels: of the font, of a character's width, of a line's height
_MARGIN, _BAR = 18.0, 34.0
_BACKGROUND, _FOREGROUND, _GREEN, _DIM = "#1b1f27", "#d7dce5", "#7fd18b", "#8892a4"


class Line(NamedTuple):
    """A line and when it appears, in seconds from the beginning."""

    at: float
    text: Text


def record() -> list[Line]:
    """Runs the demo. SystemExit if it fails."""
    command = [sys.executable, "-u", "-m", *_COMMAND]
    lines: list[Line] = []
    now = len(_SHOWN) * _TYPING + 0.6
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        assert process.stdout is not None  # noqa: S101 - it was asked for
        last = time.monotonic()
        for line in process.stdout:
            came = time.monotonic()
            now += min(came - last, _PAUSE)
            last = came
            lines.append(Line(now, Text.from_ansi(line.rstrip("\n"))))
    if process.returncode:
        sys.exit(f"upcall demo: exit code {process.returncode}")
    return lines


def drawn(lines: list[Line], at: float | None) -> str:
    """Returns the SVG: animated, or as it is `at` seconds."""
    total = lines[-1].at + _HOLD
    height = _BAR + _MARGIN + (len(lines) + 2) * _LINE
    width = 2 * _MARGIN + _COLUMNS * _CELL
    rules, body = [], []

    def show(begin: float, row: int, columns: float, content: str) -> None:
        """Adds something that appears at `begin`."""
        if at is not None and begin > at:
            return
        name = f"a{len(rules)}"
        hidden, visible = f"{100 * begin / total:.2f}%", f"{100 * begin / total + 0.01:.2f}%"
        rules.append(f"@keyframes {name}{{0%,{hidden}{{opacity:0}}{visible},100%{{opacity:1}}}}")
        rules.append(f".{name}{{animation:{name} {total:.1f}s infinite}}")
        y = _BAR + _MARGIN + row * _LINE
        body.append(f'<text class="{name}" x="{_MARGIN + columns * _CELL:.1f}" y="{y:.1f}">{content}</text>')

    show(0.0, 0, 0, span("$", 1, _GREEN))
    for number, character in enumerate(_SHOWN):
        show(0.5 + number * _TYPING, 0, 2 + number, span(character, 1, _FOREGROUND, bold=True))
    for row, line in enumerate(lines, 1):
        show(line.at, row, 0, runs(line.text))
    show(lines[-1].at + 0.3, len(lines) + 1, 0, span("$ ▂", 3, _GREEN))
    style = f"text{{font:{_SIZE}px ui-monospace,'DejaVu Sans Mono',Menlo,Consolas,monospace;white-space:pre}}"
    style += "".join(rules) if at is None else ""
    style += "@media (prefers-reduced-motion:reduce){text{animation:none!important}}"
    dots = "".join(f'<circle cx="{22 + 20 * i}" cy="18" r="6" fill="{_DIM}" opacity=".5"/>' for i in range(3))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}"><title>A recording of upcall demo</title><style>{style}</style>'
        f'<rect width="100%" height="100%" rx="9" fill="{_BACKGROUND}"/>{dots}' + "\n".join(body) + "</svg>\n"
    )


def runs(text: Text) -> str:
    """Returns the line as spans of one style each. Each has its width in cells, whatever font there is."""
    spans, plain = [], text.plain
    ends = sorted({0, len(plain), *(mark for each in text.spans for mark in (each.start, each.end))})
    if plain.startswith("✓"):
        ends = sorted({*ends, 1})
    for begin, end in itertools.pairwise(ends):
        styles = [str(each.style) for each in text.spans if each.start <= begin and end <= each.end]
        part = plain[begin:end]
        colour = _GREEN if part == "✓" else _FOREGROUND
        spans.append(span(part, end - begin, colour, any("bold" in style for style in styles), begin))
    return "".join(spans)


def span(text: str, cells: int, colour: str, bold: bool = False, column: int | None = None) -> str:
    place = "" if column is None else f' x="{_MARGIN + column * _CELL:.1f}"'
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<tspan{place} fill="{colour}"{weight} textLength="{cells * _CELL:.1f}" '
        f'lengthAdjust="spacingAndGlyphs" xml:space="preserve">{escape(text)}</tspan>'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--at", type=float, metavar="SECONDS", help="draw this moment, without animation")
    asked = parser.parse_args()
    asked.file.write_text(drawn(record(), asked.at), "utf-8")


if __name__ == "__main__":
    main()

"""Draws a soak's memory, descriptors and requests over time, as SVG, without a library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _GAP = 860, 170, 70, 180, 46
_COLOURS = ("#1b6ca8", "#c8553d", "#4c8c4a", "#7a5195", "#946c00", "#5b5b5b")
_STYLE = "font: 13px sans-serif; fill: #333"

Points = Sequence[tuple[float, float]]


class Panel(NamedTuple):
    title: str
    lines: Mapping[str, Points]  # name -> (seconds, value)


def svg(title: str, panels: Sequence[Panel]) -> str:
    """Returns an SVG with panels below each other; vertical axes from 0, horizontal axis in minutes."""
    height = 40 + len(panels) * (_HEIGHT + _GAP)
    end = max(at for panel in panels for points in panel.lines.values() for at, _ in points)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        _text(_LEFT, 22, title, "font-weight: bold"),
    ]
    for number, panel in enumerate(panels):
        parts += _panel(panel, 44 + number * (_HEIGHT + _GAP), end)
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel, top: float, end: float) -> list[str]:
    most = max(value for points in panel.lines.values() for _, value in points) or 1.0
    step = _step(most)
    most = step * (most // step + 1)
    right, bottom = _WIDTH - _RIGHT, top + _HEIGHT - 20

    def x(at: float) -> float:
        return _LEFT + at / end * (right - _LEFT)

    def y(value: float) -> float:
        return bottom - value / most * (bottom - top - 8)

    parts = [_text(_LEFT, top, panel.title)]
    value = 0.0
    while value <= most + step / 2:
        parts.append(_rule(_LEFT, y(value), right, y(value)))
        parts.append(_text(_LEFT - 8, y(value) + 4, f"{value:,g}", anchor="end"))
        value += step
    minute = max(1, round(end / 60 / 10))
    for minutes in range(0, int(end / 60 + 0.05) + 1, minute):
        label = f"{minutes} min" if minutes else "0"
        parts.append(_text(x(minutes * 60), bottom + 17, label, anchor="middle"))
    for number, (name, points) in enumerate(panel.lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        drawn = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in points)
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        parts.append(_text(right + 12, top + 16 + number * 18, name, f"fill: {colour}"))
    return parts


def _step(most: float) -> float:
    """Returns the distance of the rules: 1, 2 or 5 times a power of ten, for three to six rules."""
    power = 1.0
    while power * 10 <= most:
        power *= 10
    while power > most:
        power /= 10
    return next(power * factor for factor in (0.2, 0.5, 1, 2, 5) if most / (power * factor) < 6)


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#ddd"/>'


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="{_STYLE}; {style}">{escape(text)}</text>'

"""`python docs/drawings.py`: draws processes.svg and request.svg beside this file. Needs no library."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT, USER, KERNEL = "#f6d9d4", "#d8e8d4", "#dfe3ea"  # what a process runs as
_STYLE = "font: 13px sans-serif; fill: #222"


class Box(NamedTuple):
    x: int
    y: int
    width: int
    height: int
    colour: str
    title: str
    lines: tuple[str, ...] = ()

    @property
    def svg(self) -> str:
        parts = [
            f'<rect x="{self.x}" y="{self.y}" width="{self.width}" height="{self.height}" rx="6" fill="{self.colour}" '
            'stroke="#555"/>',
            _text(self.x + 10, self.y + 20, self.title, "font-weight: bold"),
        ]
        parts += [_text(self.x + 10, self.y + 40 + 17 * at, line) for at, line in enumerate(self.lines)]
        return "\n".join(parts)


class Arrow(NamedTuple):
    start: tuple[int, int]
    end: tuple[int, int]
    label: str = ""
    above: int = 6  # pixels of the label over the middle of the line
    back: bool = False  # points both ways

    @property
    def svg(self) -> str:
        (x1, y1), (x2, y2) = self.start, self.end
        first = ' marker-start="url(#head)"' if self.back else ""
        line = f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#333" marker-end="url(#head)"{first}/>'
        beside, anchor = (8, "start") if x1 == x2 else (0, "middle")
        middle = _text((x1 + x2) // 2 + beside, (y1 + y2) // 2 - self.above, self.label, f"text-anchor: {anchor}")
        return f"{line}\n{middle}" if self.label else line


def drawing(width: int, height: int, *parts: Box | Arrow) -> str:
    head = (
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        'orient="auto-start-reverse"><path d="M0 0 L10 5 L0 10 z" fill="#333"/></marker></defs>'
    )
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
        head,
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    return "\n".join([*lines, *(part.svg for part in parts), "</svg>", ""])


def _text(x: int, y: int, text: str, style: str = "") -> str:
    return f'<text x="{x}" y="{y}" style="{_STYLE}; {style}">{escape(text)}</text>'


def processes() -> str:
    return drawing(
        980,
        470,
        Box(
            20,
            20,
            940,
            70,
            KERNEL,
            "Linux",
            ("/dev/ecryptfs, request_key(2), quota warnings by generic netlink",),
        ),
        Box(
            20,
            170,
            300,
            120,
            ROOT,
            "broker (one)",
            (
                "root, CAP_SETUID; no network, no disk",
                "contexts, routing, deadlines,",
                "checks every answer",
                "secrets pass, none is kept",
            ),
        ),
        Box(350, 170, 220, 90, ROOT, "upcall-request-key", ("one for each key", "root, nothing else")),
        Box(
            600,
            170,
            250,
            110,
            ROOT,
            "quota source",
            ("root, CAP_SYS_ADMIN", "reads warnings, keeps state,", "decides who is notified"),
        ),
        Box(
            20,
            370,
            300,
            85,
            USER,
            "daemon (one per user)",
            ("the user, no capabilities", "the user's keys and tickets; plugins"),
        ),
        Box(
            350,
            370,
            220,
            85,
            USER,
            "key module (isolated)",
            ("the user; one socket", "foreign libraries: tokens, TPM"),
        ),
        Box(
            600,
            370,
            250,
            85,
            USER,
            "machine's daemon",
            ("user upcall, no capabilities", "keytab copy; parses network data"),
        ),
        Arrow((170, 90), (170, 170), "frames of each uid", 2, True),
        Arrow((460, 90), (460, 170), "exec", 0),
        Arrow((720, 90), (720, 170), "warnings", 0),
        Arrow((350, 215), (320, 215), "", 6, True),
        Arrow((600, 270), (320, 270), "source.sock", -14, True),
        Arrow((170, 290), (170, 370), "a netlink pair of its own", 2, True),
        Arrow((350, 410), (320, 410), "", 6, True),
        Arrow((320, 285), (600, 385), "another pair", 8, True),
    )


def request() -> str:
    row, up, down = 60, 150, 190
    return drawing(
        980,
        250,
        Box(20, row, 130, 170, KERNEL, "kernel", ("one request,", "waits 3 s")),
        Box(220, row, 150, 170, ROOT, "source", ("checks the form;", "an origin that", "is settled once")),
        Box(
            430,
            row,
            160,
            170,
            ROOT,
            "router",
            ("context, deadline;", "index, sequence,", "uid and pid of the", "reply; its content"),
        ),
        Box(660, row, 130, 170, USER, "daemon", ("worker, lane;", "handler of the", "service")),
        Box(850, row, 110, 170, USER, "plugin", ("wraps, looks", "up, tells")),
        Arrow((150, up), (220, up), "frame"),
        Arrow((370, up), (430, up), "ask"),
        Arrow((590, up), (660, up), "REQUEST"),
        Arrow((790, up), (850, up), "answer()"),
        Arrow((850, down), (790, down), ""),
        Arrow((660, down), (590, down), "RESPONSE"),
        Arrow((430, down), (370, down), "settle"),
        Arrow((220, down), (150, down), "frame"),
        Arrow((510, 40), (510, row), ""),
        Box(400, 8, 330, 32, "#fff8dc", "or: deadline, daemon's end, broker's end"),
    )


if __name__ == "__main__":
    (HERE / "processes.svg").write_text(processes(), "utf-8")
    (HERE / "request.svg").write_text(request(), "utf-8")

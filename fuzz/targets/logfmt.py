"""Fuzzes values in the log: names and texts of any origin.

Never raises. The result is one printable line, and separable from other fields: without quotes it contains no blank.
"""

from __future__ import annotations

import ast

from fuzz.target import holds, same
from upcall.cli import for_terminal
from upcall.daemon.prompting.requester import plain
from upcall.protocols.quota.notice import printable
from upcall.wire.logfmt import shown

SEEDS = [b"plain", b"two words", b"\x1b[2J", "“”\u202e\ud7ff".encode(), b"a'b\"c", b"x\ny z=1"]


def run(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    line = shown(text)
    holds(line.isprintable(), "not one printable line")
    if line[:1] in ("'", '"'):
        same(ast.literal_eval(line), text)
    else:
        same(line, text)
        holds(" " not in line, "a blank without quotes")
    holds(plain(text).isprintable() and len(plain(text)) <= 160, "a prompt that is not plain")
    holds(for_terminal(text).isprintable(), "an order to a terminal")
    holds(printable(text).isprintable(), "a notice that is not printable")

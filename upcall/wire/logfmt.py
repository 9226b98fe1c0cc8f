"""How a value stands in a line of the log. Pure."""

from __future__ import annotations


def shown(value: object) -> str:
    """A value on one line: quoted when it has blanks, quotes or anything unprintable."""
    text = str(value)
    return text if text and text.isprintable() and not {" ", '"', "'"} & {*text} else ascii(text)

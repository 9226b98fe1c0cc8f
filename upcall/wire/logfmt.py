"""Formats values for a line of the log. Pure."""

from __future__ import annotations

from upcall.core.errors import error_words


def shown(value: object) -> str:
    """Returns a value on one line, quoted if it is empty or contains blanks, quotes or unprintable characters."""
    text = error_words(value) if isinstance(value, OSError) else str(value)
    return text if text and text.isprintable() and not {" ", '"', "'"} & {*text} else ascii(text)

"""Suggests a known name for one that is not known, as git and gh do."""

from __future__ import annotations

from collections.abc import Callable, Iterable


def did_you_mean(name: str, known: Iterable[str], spelled: Callable[[str], str] = "'{}'".format) -> str:
    """Returns the end of an error's sentence, such as "; did you mean 'list'?"; "" if nothing known is close.
    `spelled`: returns how a name is written."""
    from difflib import get_close_matches  # imported only for what is misspelt

    close = get_close_matches(name, [*known], 1)
    return f"; did you mean {spelled(close[0])}?" if close else ""

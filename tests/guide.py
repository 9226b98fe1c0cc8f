"""Takes the examples out of docs/plugin-guide.md, and puts them into a plugin that `upcall plugin new` has made."""

from __future__ import annotations

import re
from pathlib import Path

GUIDE = Path(__file__).parents[1] / "docs" / "plugin-guide.md"


def snippet(mark: str) -> str:
    """The guide's code block below this mark."""
    found = re.search(rf"<!-- {mark} -->\n```python\n(.*?)```\n", GUIDE.read_text(), re.DOTALL)
    assert found is not None, mark
    return found[1]


def with_verbs(source: str) -> str:
    """The guide's verbs in the place of the template's."""
    lines = source.split("\n")
    begin = next(number for number, line in enumerate(lines) if line.startswith("# --- YOUR TWO VERBS"))
    end = next(number for number, line in enumerate(lines) if line.startswith("# --- until here"))
    text = "\n".join([*lines[: begin + 1], snippet("verbs"), *lines[end:]])
    imports = re.compile(r"from cryptography\.hazmat\.primitives\.keywrap import \(.*?\)\n", re.DOTALL)
    assert imports.search(text)
    return imports.sub(lambda _: snippet("imports"), text)

"""`python -m upcall.config.reference FILE...`: writes the reference of all keys into documents, between two marks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from upcall.config.keys import TABLES
from upcall.config.shown import as_toml
from upcall.config.table import ANY, SYSTEM, Key

BEGIN: Final = "<!-- keys: written by `make docs` from upcall/config/keys.py -->\n"
END: Final = "<!-- end of keys -->\n"

_HEAD: Final = "| key | value | default | who sets it | |\n| --- | --- | --- | --- | --- |\n"


def reference() -> str:
    """Returns the reference of all tables in Markdown."""
    sections: dict[tuple[str, str], list[Key]] = {}
    for table in TABLES:
        heading = table.family or (table.name.replace(ANY, "NAME"), table.about)
        sections.setdefault(heading, []).extend(table.keys)
    return "\n".join(_section(*heading, keys) for heading, keys in sections.items())


def _section(name: str, about: str, keys: list[Key]) -> str:
    """Returns a section. Identical keys of several tables of a family share a row."""
    rows = "".join(dict.fromkeys(map(_row, keys)))
    return f"### `[{name}]`\n\n{about}\n\n{_HEAD}{rows}"


def _row(key: Key) -> str:
    name = "any" if key.name == ANY else f"`{key.name}`"
    default = key.unset if key.default is None else f"`{as_toml(key.default)}`"
    who = (
        "the system" if key.scope == SYSTEM else "the system; users narrow it" if key.narrows else "the system, users"
    )
    return f"| {name} | {key.kind.wanted} | {default} | {who} | {key.about} |\n"


def written(text: str) -> str:
    """Returns the document with the text between the marks replaced. ValueError if it has no marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("there are no marks for the keys")
    return f"{before}{begin}\n{reference()}\n{end}{after}"


def main(files: list[str]) -> None:
    """Rewrites the documents."""
    for file in map(Path, files):
        file.write_text(written(file.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

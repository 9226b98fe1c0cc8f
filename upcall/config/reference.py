"""`python -m upcall.config.reference FILE...`: writes the registry of keys into documents, between two marks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from upcall.config.keys import TABLES
from upcall.config.shown import as_toml
from upcall.config.table import ANY, SYSTEM, Key, Table

BEGIN: Final = "<!-- keys: written by `make docs` from upcall/config/keys.py -->\n"
END: Final = "<!-- end of keys -->\n"

_HEAD: Final = "| key | value | default | who sets it | |\n| --- | --- | --- | --- | --- |\n"


def reference() -> str:
    """All tables, in Markdown."""
    return "\n".join(_table(table) for table in TABLES)


def _table(table: Table) -> str:
    rows = "".join(_row(key) for key in table.keys)
    name = table.name.replace(ANY, "NAME")
    return f"### `[{name}]`\n\n{table.about}\n\n{_HEAD}{rows}"


def _row(key: Key) -> str:
    name = "any" if key.name == ANY else f"`{key.name}`"
    default = key.unset if key.default is None else f"`{as_toml(key.default)}`"
    who = (
        "the system" if key.scope == SYSTEM else "the system; users narrow it" if key.narrows else "the system, users"
    )
    return f"| {name} | {key.kind.wanted} | {default} | {who} | {key.about} |\n"


def written(text: str) -> str:
    """The document with what stands between the marks made anew. ValueError if it has no marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("there are no marks for the keys")
    return f"{before}{begin}\n{reference()}\n{end}{after}"


def main(files: list[str]) -> None:
    for file in map(Path, files):
        file.write_text(written(file.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

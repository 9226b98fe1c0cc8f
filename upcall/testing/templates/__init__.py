"""Writes the project of a new plugin, for `upcall plugin new`: the files below `plugin`, with names filled in."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from upcall.core.errors import UsageError
from upcall.keys.plugins import MAX_ALIAS

_NAME = re.compile(rf"[a-z][a-z0-9_]{{0,{MAX_ALIAS - 1}}}")
_SUFFIX = ".in"  # keeps tools from treating templates as source files


def write_plugin(name: str, folder: Path) -> list[Path]:
    """Writes the project into `folder`, which must be new or empty. Returns the files. UsageError, OSError."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r}: a key module's name is 1 to {MAX_ALIAS} of a-z, 0-9 and _, and begins with a letter"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(errno.EEXIST, "is there already", str(folder))
    words = {"@NAME@": name, "@PACKAGE@": f"upcall_{name}", "@CLASS@": name.title().replace("_", "")}
    return [_write(folder / _filled(path, words), template, words) for path, template in _templates()]


def _templates() -> Iterator[tuple[str, Traversable]]:
    """Yields (path below the project, template). `@` in names is replaced as in the text."""
    left = [("", resources.files(__package__) / "plugin")]
    while left:
        path, found = left.pop()
        if found.is_dir():
            below = sorted(found.iterdir(), key=lambda one: one.name, reverse=True)
            left += [(f"{path}/{one.name}".lstrip("/"), one) for one in below]
        elif path.endswith(_SUFFIX):
            yield path.removesuffix(_SUFFIX), found


def _filled(text: str, words: dict[str, str]) -> str:
    for word, value in words.items():
        text = text.replace(word, value)
    return text


def _write(path: Path, template: Traversable, words: dict[str, str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_filled(template.read_text("utf-8"), words), "utf-8")
    return path

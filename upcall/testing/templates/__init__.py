"""Writes the project of a new plugin, for `upcall plugin new`: the files below `shared` and one of the other folders,
with names filled in."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Final

from upcall.core.errors import UsageError
from upcall.core.suggestion import did_you_mean
from upcall.keys.plugins import MAX_ALIAS
from upcall.testing.templates.services import SERVICES

KEY_MODULE, HANDLER, SINK = "key_module", "handler", "sink"  # the folders

_SHARED: Final = "shared"
_NAME = re.compile(rf"[a-z][a-z0-9_]{{0,{MAX_ALIAS - 1}}}")
_SUFFIX = ".in"  # keeps tools from treating templates as source files


def write_plugin(name: str, folder: Path, kind: str = KEY_MODULE, service: str = "") -> list[Path]:
    """Writes the project into `folder`, which must be new or empty. `kind`: KEY_MODULE, HANDLER or SINK. `service`:
    that a handler answers, one of SERVICES. Returns the files. UsageError, OSError."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r}: a plugin's name is 1 to {MAX_ALIAS} of a-z, 0-9 and _, and begins with a letter")
    words = {"@NAME@": name, "@PACKAGE@": f"upcall_{name}", "@CLASS@": name.title().replace("_", "")}
    if kind == HANDLER:
        words |= _of_service(service)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(errno.EEXIST, "is there already", str(folder))
    found = {folder / _filled(path, words): file for one in (_SHARED, kind) for path, file in _templates(one)}
    return [_write(path, found[path], words) for path in sorted(found)]


def _of_service(service: str) -> dict[str, str]:
    if service not in SERVICES:
        suggested = did_you_mean(service, SERVICES)
        raise UsageError(
            f"a handler for '{service}' cannot be begun{suggested or ': ' + ', '.join(SERVICES) + ' can'}"
        )
    found = SERVICES[service]._asdict()
    return {"@SERVICE@": service, **{f"@{name.upper()}@": value for name, value in found.items()}}


def _templates(kind: str) -> Iterator[tuple[str, Traversable]]:
    """Yields (path below the project, template). `@` in names is replaced as in the text."""
    left = [("", resources.files(__package__) / kind)]
    while left:
        path, found = left.pop()
        if found.is_dir():
            left += [(f"{path}/{one.name}".lstrip("/"), one) for one in found.iterdir()]
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

"""`python -m release.version [NEW]`: prints the version of all packages, or writes a new one wherever one stands.

upcall's pyproject.toml has it. The plugins' have the same one, and need upcall of exactly this version, because they
use its insides; the forwarder and its stand-in print it. tests/test_release.py compares all of them.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Final

from release.build import ROOT, projects

_FORM: Final = r"[0-9]+(?:\.[0-9]+)+(?:(?:a|b|rc)[0-9]+)?"  # PEP 440: what upcall uses of it
_PROJECT: Final = (rf'^version = "({_FORM})"', rf'"upcall(?:-[a-z0-9]+)?(?:\[[a-z,]+\])?==({_FORM})"')
_OTHERS: Final = {
    "upcall/__init__.py": rf'^__version__ = "({_FORM})"',
    "upcall/protocols/request_key/forwarder/standin.py": rf'^NAME, RELEASE = "upcall-request-key", "({_FORM})"',
    "upcall/protocols/request_key/forwarder/forward.c": rf'^#define RELEASE "({_FORM})"',
}


def version(root: Path = ROOT) -> str:
    """Returns the version that upcall's pyproject.toml says."""
    return str(tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"])


def places(root: Path = ROOT) -> dict[Path, list[str]]:
    """Returns file -> patterns of the places in it that hold a version. Each pattern must match."""
    found = {folder / "pyproject.toml": list(_PROJECT) for folder in projects(root)}
    return found | {root / name: [pattern] for name, pattern in _OTHERS.items()}


def written(root: Path = ROOT) -> dict[Path, list[str]]:
    """Returns file -> the versions that stand in it. SystemExit if a place has none."""
    found: dict[Path, list[str]] = {}
    for path, patterns in places(root).items():
        for pattern in patterns:
            versions = re.findall(pattern, path.read_text(), re.MULTILINE)
            if not versions:
                raise SystemExit(f"{path}: has no version: {pattern}")
            found.setdefault(path, []).extend(versions)
    return found


def write(new: str, root: Path = ROOT) -> None:
    """Writes the version `new` into every place. SystemExit if it is none."""
    if not re.fullmatch(_FORM, new):
        raise SystemExit(f"{new}: not a version such as 1.2.0, 1.2.0a1, 1.2.0b1 or 1.2.0rc1")
    for path, patterns in places(root).items():
        text = path.read_text()
        for pattern in patterns:
            text = re.sub(pattern, lambda found: found[0].replace(found[1], new), text, flags=re.MULTILINE)
        path.write_text(text)


def main() -> None:
    if sys.argv[1:]:
        write(sys.argv[1])
    print(version())


if __name__ == "__main__":
    main()

"""Checks that the tests that SECURITY.md names exist, and that they ran and passed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "SECURITY.md").read_text("utf-8")
TESTS = re.compile(r"`((?:tests|plugins)/[\w/]+\.py)::([\w:]+)`")
CITED = sorted(set(TESTS.findall(TEXT)))


def unshown(files: Iterable[str], passed: Iterable[str]) -> list[str]:
    """Returns the files of which no test has passed. `passed`: node ids, with or without parameters."""
    wanted, shown = set(files), {name.partition("[")[0] for name in passed}
    return [f"{file}::{test}" for file, test in CITED if file in wanted and f"{file}::{test}" not in shown]


def passed_in(junit: Path) -> list[str]:
    """Returns the node ids of passed tests, from pytest's JUnit XML."""
    found = []
    for case in ElementTree.parse(junit).iter("testcase"):
        if not len(case):  # neither failure nor error nor skipped
            *module, name = *case.get("classname", "").split("."), case.get("name", "")
            found.append(f"{'/'.join(module)}.py::{name}")
    return found

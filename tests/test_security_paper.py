"""SECURITY.md: every test that it names is there, and every claim of a table names one. That they ran and passed,
`make test` and `make test-all` look at themselves (--cited)."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from tests.cited import CITED, ROOT, TESTS, TEXT, passed_in, unshown


@functools.cache
def known_in(file: str) -> set[str]:
    """What pytest would collect there: `test_x`, `TestY::test_x`."""
    found = set()
    for node in ast.parse((ROOT / file).read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            found.add(node.name)
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            inner = [one for one in node.body if isinstance(one, ast.FunctionDef) and one.name.startswith("test_")]
            found |= {f"{node.name}::{one.name}" for one in inner}
    return found


@pytest.mark.parametrize(("file", "test"), CITED)
def test_every_cited_test_exists(file: str, test: str) -> None:
    assert (ROOT / file).is_file(), file
    assert test in known_in(file), f"{file} has no {test}"


def test_every_citation_has_the_form_that_is_checked() -> None:
    """A citation in another form would not be checked."""
    assert len(re.findall(r"::test_|::Test", TEXT)) == len(TESTS.findall(TEXT)) >= 100


def test_every_claim_has_its_test() -> None:
    claims = TEXT.partition("## Threats, defences and tests")[2].partition("## What is not defended")[0]
    heads = ("| attack ", "| component ", "| the kernel ", "| process ", "| --- ")
    rows = [line for line in claims.splitlines() if line.startswith("|") and not line.startswith(heads)]
    assert len(rows) > 50
    assert [row for row in rows if not TESTS.search(row.rsplit(" | ", 1)[1])] == []


def test_a_cited_test_that_did_not_pass_is_found(tmp_path: Path) -> None:
    file, test = CITED[0]
    others = [f"{file}::{other}" for of, other in CITED if of == file and other != test]
    assert unshown([file], others) == [f"{file}::{test}"]
    assert unshown([file], [*others, f"{file}::{test}[case]"]) == []
    assert unshown([], []) == []
    case = f'<testcase classname="{file.removesuffix(".py").replace("/", ".")}" name="{test}[a]">'
    for inside, found in (("", [f"{file}::{test}[a]"]), ("<skipped/>", []), ("<failure/>", [])):
        (tmp_path / "junit.xml").write_text(
            f"<testsuites><testsuite>{case}{inside}</testcase></testsuite></testsuites>"
        )
        assert passed_in(tmp_path / "junit.xml") == found

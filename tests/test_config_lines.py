"""The lines of keys: a table of TOML's ways to write them, and whatever tomli_w writes."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from upcall.config.lines import Path, dotted, lines, spelled

WHOLE = '''# a comment = 1
top = 1
[table]   # said = "here"
bare-key_1 = "a # b = c"
"quoted \\u0041" = 'x = 1'
'literal"' . "dotted" = 1979-05-27 07:32:00
many = """
fake = 1
[fake]
\\""" still = "in it"
"""""
more = \'\'\'
fake = 2
\'\'\'
list = [ # the first
  1, "]",
  [2, 3], # fake = 3
  { inner = 1, other.deep = "}" },
]
inline = { a = 1, b = { c = [ { d = 2 } ] } }
empty = []
none = {}
[other."a.b"]
last=true
[[array]]
x = 1
[[array]]
x = 2
\ty\t=\t"tabs"'''

FOUND = {
    ("top",): 2,
    ("table",): 3,
    ("table", "bare-key_1"): 4,
    ("table", "quoted A"): 5,
    ("table", 'literal"'): 6,
    ("table", 'literal"', "dotted"): 6,
    ("table", "many"): 7,
    ("table", "more"): 12,
    ("table", "list"): 15,
    ("table", "list", "inner"): 18,
    ("table", "list", "other"): 18,
    ("table", "list", "other", "deep"): 18,
    ("table", "inline"): 20,
    ("table", "inline", "a"): 20,
    ("table", "inline", "b"): 20,
    ("table", "inline", "b", "c"): 20,
    ("table", "inline", "b", "c", "d"): 20,
    ("table", "empty"): 21,
    ("table", "none"): 22,
    ("other",): 23,
    ("other", "a.b"): 23,
    ("other", "a.b", "last"): 24,
    ("array",): 25,
    ("array", "x"): 26,
    ("array", "y"): 29,
}


def test_every_way_to_write_a_key_is_found_at_its_line() -> None:
    tomllib.loads(WHOLE)  # it is TOML
    assert lines(WHOLE) == FOUND
    assert lines(WHOLE.replace("\n", "\r\n")) == FOUND


@pytest.mark.parametrize(
    "text", ["", "\n\n", "# only a comment", "a", "a =", "[", "[a", "a = [", "a = {b", '"', "= 1"]
)
def test_invalid_toml_raises_nothing(text: str) -> None:
    lines(text)


def test_keys_before_invalid_toml_are_found() -> None:
    assert lines("a = 1\n?\nb = 2") == {("a",): 1}
    assert lines("a = 1\nb = " + "[" * 100_000)[("a",)] == 1


NAMES = st.text(st.characters(codec="utf-8"), max_size=5)
VALUES = st.one_of(
    st.integers(0, 9),
    st.booleans(),
    st.floats(allow_nan=False),
    st.dates(),
    st.text(st.characters(codec="utf-8"), max_size=12),
    st.text('"\\#=[]{}\n', max_size=12),
    st.lists(st.text('"\\#=[],\n', max_size=5), max_size=3),
)
TREES = st.recursive(
    st.dictionaries(NAMES, VALUES, max_size=4), lambda inner: st.dictionaries(NAMES, VALUES | inner, max_size=4)
)


def paths(tree: Mapping[str, Any], above: Path = ()) -> Iterator[Path]:
    for name, value in tree.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from paths(value, (*above, name))


def marked(tree: Mapping[str, Any], count: Iterator[int]) -> dict[str, Any]:
    """The same, with numbers that occur once."""
    marks = {name: marked(value, count) if isinstance(value, dict) else value for name, value in tree.items()}
    return {name: next(count) if isinstance(value, int) else value for name, value in marks.items()}


@given(TREES, st.booleans())
def test_every_key_that_tomli_w_writes_is_found_at_its_line(tree: dict[str, Any], multiline: bool) -> None:
    tree = marked(tree, iter(range(10**6, 10**7)))
    text = tomli_w.dumps(tree, multiline_strings=multiline)
    assert tomllib.loads(text) == tree
    found, there = lines(text), text.split("\n")
    assert found.keys() == set(paths(tree))
    for path, line in found.items():
        value: Any = tree
        for name in path:
            value = value[name]
        if isinstance(value, int):
            assert there[line - 1].endswith(f" = {value}")


@given(st.lists(NAMES, min_size=1, max_size=4))
def test_a_spelled_path_reads_back_as_the_same_toml_key(path: list[str]) -> None:
    assert dotted(spelled(tuple(path))) == tuple(path)
    found: Any = tomllib.loads(f"{spelled(tuple(path))} = 1")
    for name in path:
        found = found[name]
    assert found == 1


@pytest.mark.parametrize("text", ["", "a.", ".a", "a b", "a = 1", '"a', "a..b", "é"])
def test_an_invalid_dotted_path_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"key"):
        dotted(text)

"""request-key's configuration as we read it, and as the real request-key does, in a folder of the test's own."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from upcall.protocols.request_key.conf import (
    MAX_LINE,
    BadLine,
    Line,
    RequestedKey,
    choose,
    command_fault,
    lines,
    narrower,
    wildness,
    wildness_of,
)

REQUEST_KEY = shutil.which("request-key", path="/sbin:/usr/sbin")
SPNEGO = RequestedKey(
    b"cifs.spnego", b"ver=0x2;host=fs.lab.test;ip4=127.0.0.1;sec=krb5;uid=0x0;creduid=0x3e9;pid=0x164"
)
DISTRIBUTION = b"create  cifs.spnego    * * /usr/sbin/cifs.upcall %k\n"
OURS = b"create cifs.spnego ver=0x2;host=* * /usr/local/libexec/upcall-request-key %k\n"


def chosen(key: RequestedKey, **files: bytes) -> str | None:
    line = choose([line for name, data in files.items() for line in lines(name, data)], key)
    return None if line is None else str(line)


@pytest.mark.parametrize(
    ("pattern", "text", "skipped"),
    [
        ("abc", "abc", 0), ("abc", "abcd", None), ("abc", "ab", None), ("*", "", 0), ("*", "abc", 3),
        ("abc*", "abc", 0), ("abc*", "abcde", 2), ("abc*", "ab", None), ("*abc", "xabc", 1), ("*abc", "abc", 0),
        ("*abc", "abcx", None), ("**", "x*", 1), ("**", "xy", None), ("a**", "a*", None),
        # In the middle, it is the pattern's beginning that the end is compared with.
        ("ab*c", "abxc", None), ("ab*c", "abxa", 1), ("a*bc", "axa*", 1), ("a*a", "aa", 0), ("a*a", "a", None),
    ],
)  # fmt: skip
def test_a_pattern_matches_as_in_request_key(pattern: str, text: str, skipped: int | None) -> None:
    assert wildness_of(pattern.encode(), text.encode()) == skipped


def test_a_line_is_split_into_columns_and_keeps_its_number() -> None:
    data = b"# a comment\n\n create x * * /indented\n\t\ncreate\tuser\tdebug:*\t \v*  |/bin/cat -n\r\n"
    (line,) = lines("f", data)
    assert line == Line("f", 5, (b"create", b"user", b"debug:*", b"*"), b"|/bin/cat -n\r")
    assert (line.program, str(line)) == ("/bin/cat", "f:5")


def test_the_last_character_of_a_file_counts_as_its_newline() -> None:
    assert [line.command for line in lines("f", b"create a * * /bin/x")] == [b"/bin/"]


def test_a_line_longer_than_the_limit_is_refused() -> None:
    longest = b"create a * * /x " + b"x" * MAX_LINE
    (line,) = lines("f", longest[: MAX_LINE - 1] + b"\n")
    assert wildness(line, RequestedKey(b"a", b"")) == (0, 0, 0, 0)
    for data in (longest[:MAX_LINE] + b"\n", longest, b"#" + longest * 3):
        with pytest.raises(BadLine, match="f: line 1: is longer than 4094 bytes"):
            chosen(RequestedKey(b"other", b""), f=data)


@pytest.mark.parametrize("cut", [b"create\n", b"create a\n", b"create a b\n", b"create a b *\n", b"create a b * \n"])
def test_a_line_cut_short_is_refused_if_a_search_reaches_its_end(cut: bytes) -> None:
    good = b"create a b * /good\n"
    with pytest.raises(BadLine, match="f: line 2: "):
        chosen(RequestedKey(b"a", b"b"), f=good + cut)


def test_a_line_cut_short_is_ignored_if_no_search_reaches_its_end() -> None:
    assert chosen(RequestedKey(b"a", b"b"), f=b"create c d\ncreate a c *\nnegate \ncreate a b * /good\n") == "f:4"
    with pytest.raises(BadLine, match="f: line 1: ends at its operation"):
        chosen(RequestedKey(b"a", b"b"), f=b"negate\ncreate a b * /good\n")


def test_a_line_ends_at_a_nul_byte_and_must_not_begin_with_one() -> None:
    assert [(one.number, one.command) for one in lines("f", b"create a * * /x\0 gone\ncreate b * * /y\n")] == [
        (1, b"/"), (2, b"/y"),
    ]  # fmt: skip
    with pytest.raises(BadLine, match="begins with a NUL"):
        chosen(RequestedKey(b"a", b""), f=b"\0create a * * /x\n")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a": DISTRIBUTION}, "a:1"),
        ({"a": DISTRIBUTION, "ours": OURS}, "ours:1"),
        ({"ours": OURS, "a": DISTRIBUTION}, "ours:1"),
        ({"a": b"* cifs.spnego ver=0x2;host=fs.* * /x\n", "ours": OURS}, "ours:1"),
        ({"a": b"create cifs.* ver=0x2;host=fs.* * /x\n", "ours": OURS}, "ours:1"),
        ({"a": b"create cifs.spnego* ver=0x2;host=fs.* * /x\n", "ours": OURS}, "a:1"),
        ({"ours": OURS, "a": OURS}, "ours:1"),
        ({"a": OURS, "ours": OURS}, "a:1"),
        ({"a": b"negate * * * /x\n"}, None),
        ({}, None),
    ],
)
def test_the_least_wild_line_wins_and_of_equal_lines_the_first(files: dict[str, bytes], expected: str | None) -> None:
    assert chosen(SPNEGO, **files) == expected


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("/x", ""), ("|/x", ""), ("/x %k %%anything %kk %{user:a}", ""), ("/x" + " a" * 253, ""),
        ("x", "the program has no path"), ("| /x", "the program has no path"), ("|", "the program has no path"),
        ("/x" + " a" * 254, "more than 253 arguments"), ("/x %", "% is no macro"), ("/x %k %z", "%z is no macro"),
        ("/x %{user}", "%{user} is no macro"), ("/x %{:a}", "%{:a} is no macro"), ("/x %{a:}", "%{a:} is no macro"),
        ("/x %{a:b", "%{a:b is no macro"), ("/x %{a:b}c}", "%{a:b}c} is no macro"),
    ],
)  # fmt: skip
def test_a_command_that_request_key_cannot_run_is_refused(command: str, fault: str) -> None:
    assert command_fault(command.encode()) == fault
    if fault:
        with pytest.raises(BadLine, match=re.escape(fault)):
            chosen(RequestedKey(b"a", b""), f=f"create a * * {command}\n".encode())


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ("create cifs.spnego *", False), ("create cifs.spnego ver=0x2;*", False),
        ("create cifs.spnego ver=0x2;host=*", False), ("create cifs.spnego ver=0x2;host=fs.*", True),
        ("create cifs.spnego ver=0x1;host=fs.*", False), ("create cifs.spnego *;upcall_target=app", True),
        ("create cifs.spnego *;pid=0x1", False), ("create cifs.* ver=0x2;host=fs.*", False),
        ("create cifs.spnego ver=0x2;host=fs;pid=0x1", True), ("create cifs.spnego ver=0x3", False),
        ("create user ver=0x2;host=fs.*", False), ("* cifs.spnego ver=0x2;host=fs.*", False), ("create user", False),
    ],
)  # fmt: skip
def test_a_line_that_keeps_some_keys_from_ours_is_found(columns: str, expected: bool) -> None:
    line = Line("f", 1, tuple(columns.encode().split()), b"/x")
    assert narrower(line, b"cifs.spnego", b"ver=0x2;host=*") is expected


# --- the real one: -d runs nothing and touches no key, -l reads the working directory instead of /etc -----------

FILES = ("request-key.d/a.conf", "request-key.d/b.conf", "request-key.conf")


def really_chosen(folder: Path, key: RequestedKey) -> str | None:
    """As file:line; "bad" if it gave up."""
    describe = f"{key.type.decode()};0;0;3f010000;{key.description.decode()}"
    command = [str(REQUEST_KEY), "-l", "-d", "-n", "-v", "-D", describe, "create", *"100000", key.callout.decode()]
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=60)
    if b"No matching action" in done.stderr:
        return None
    preferred = re.findall(rb"^(.*:\d+): Prefer command", done.stderr, re.MULTILINE)
    return "bad" if done.returncode else preferred[-1].decode()


def ours_chosen(folder: Path, key: RequestedKey) -> str | None:
    names = [entry.name for entry in os.scandir(folder / "request-key.d")]
    read = [line for name in names for line in lines(name, (folder / "request-key.d" / name).read_bytes())]
    read += lines("request-key.conf", (folder / "request-key.conf").read_bytes())
    try:
        found = choose(read, key)
    except BadLine:
        return "bad"
    return None if found is None else str(found)


class Chance(random.Random):
    def line(self) -> bytes:
        columns = [
            self.choice([b"create"] * 8 + [b"*", b"cr*te", b"negate", b"create*"]),
            self.choice([b"abc"] * 4 + [b"*", b"a*", b"ab*c", b"abc*", b"x"]),
            self.choice([b"*", b"a*", b"*b", b"a*b", b"a*a", b"aab", b"aaab", self.word()]),
            self.choice([b"*", b"*", b"a", b"a*", b"b"]),
            self.choice([b"/x/1"] * 9 + [b"|/p", b"/x %", b"/x %k", b"/x %z", b"/x %{a:b}cc", b"/x %{ab", b"rel/x"]),
        ]
        text = self.choice([b" ", b"\t", b"  ", b" \v"]).join(columns[: self.choice([5] * 30 + [1, 2, 3, 4])])
        text += self.choice([b"", b"", b" ", b"\r"])
        kind = self.random()
        if kind < 0.02:
            return text + b" " + b"a" * (self.choice([4092, 4093, 4094, 4095, 4096, 4097, 9000]) - len(text))
        if kind < 0.03:
            at = self.randint(0, len(text))
            return text[:at] + b"\0" + text[at:]
        return (b"#" if kind < 0.05 else b" " if kind < 0.06 else b"") + text

    def word(self) -> bytes:
        return bytes(self.choices(b"ab*", k=self.randint(1, 4)))


@pytest.mark.skipif(REQUEST_KEY is None, reason="needs keyutils")
@pytest.mark.parametrize("seed", range(4))
def test_the_real_request_key_chooses_the_same_line(seed: int, tmp_path: Path) -> None:
    chance = Chance(seed)
    (tmp_path / "request-key.d").mkdir()
    outcomes = set()
    for _ in range(100):
        for name in FILES:
            data = b"\n".join(chance.line() for _ in range(chance.randint(1, 3))) + chance.choice([b"\n", b""])
            (tmp_path / name).write_bytes(data)
        for key in (
            RequestedKey(b"abc", b"aab"),
            RequestedKey(b"abc", b"aaab", b"a"),
            RequestedKey(b"abc", chance.choice([b"b", b"ab", b"aa"])),
        ):
            expected = really_chosen(tmp_path, key)
            assert ours_chosen(tmp_path, key) == expected, [(tmp_path / name).read_bytes() for name in FILES]
            outcomes.add(expected)
    assert {None, "bad", "request-key.conf:1"} < outcomes

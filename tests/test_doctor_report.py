"""The report of `upcall doctor`: the table of checks, checks that hang or raise, text, JSON, exit codes."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

import upcall.cli.doctor
from upcall.cli import main
from upcall.core.errors import UsageError
from upcall.observe.doctor import table
from upcall.observe.doctor.findings import NOTE, OK, Finding, note, ok, problem
from upcall.observe.doctor.system import Scene
from upcall.observe.doctor.table import CHECKS, Check, bounded

PROMPT = "#" if os.geteuid() == 0 else "$"
DOCS = Path(__file__).parents[1] / "docs" / "observing.md"


def check(*findings: Finding, error: Exception | None = None) -> Check:
    def look(scene: Scene) -> Iterator[Finding]:
        yield from findings
        if error is not None:
            raise error

    return Check("it", "something", look)


def run(monkeypatch: pytest.MonkeyPatch, checks: list[Check], *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(table, "CHECKS", checks)
    result = CliRunner().invoke(main, ["doctor", *arguments])
    return result.exit_code, result.output


def test_every_check_is_documented_and_has_a_name_of_its_own() -> None:
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    for one in CHECKS:
        assert f"| `{one.name}` | {one.about} |" in rows
    assert len({one.name for one in CHECKS}) == len(CHECKS)


def test_a_check_that_hangs_becomes_a_finding_after_its_earlier_ones() -> None:
    release = threading.Event()

    def look(scene: Scene) -> Iterator[Finding]:
        yield ok("so far")
        release.wait(60)

    try:
        first, second = bounded(Check("it", "", look, 0.05), Scene())
        assert first == ok("so far")
        assert "no result within 0.05 s" in second.what
    finally:
        release.set()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UsageError("somebody else's"), "somebody else's"),
        (PermissionError(13, "Permission denied", "/x"), "/x"),
        (ZeroDivisionError("oh"), "the check broke: ZeroDivisionError"),
    ],
    ids=["UsageError", "PermissionError", "ZeroDivisionError"],
)
def test_a_check_that_raises_becomes_a_finding_after_its_earlier_ones(error: Exception, words: str) -> None:
    first, second = bounded(check(ok("so far"), error=error), Scene())
    assert first.state == OK
    assert words in second.what


def test_without_problems_the_report_ends_with_exit_code_0(monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = run(monkeypatch, [check(ok("good"), note("a note", "think", "true"))])
    assert code == 0
    assert text.splitlines() == ["✓ it: good", "- it: a note", "    think", f"    {PROMPT} true", "no problems"]


def test_a_problem_is_printed_with_its_remedy_and_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = run(monkeypatch, [check(ok("good"), problem("bad\x1b[2J", "do", "rm 'a\nb'"))], "--quiet")
    assert code == 1
    assert text.splitlines() == ["✗ it: bad\\x1b[2J", "    do", f"    {PROMPT} rm 'a\\nb'"]


@pytest.mark.parametrize(
    ("uid", "command", "prompt"),
    [
        (1000, "systemctl start upcall-broker.service", "#"),
        (1000, "upcall request-key install --type cifs.spnego", "#"),
        (1000, "apt install ./upcall-spnego_*.deb", "#"),
        (1000, "chmod 0600 /etc/passwd", "#"),
        (1000, "mv /etc/request-key.d/upcall.conf /etc/request-key.d/upcall.conf.old", "#"),
        (os.getuid(), "kill -CONT OURS", PROMPT),
        (os.getuid() + 1, "kill -CONT OURS", "#"),
        (1000, "chmod 0600 /no/such/file", "$"),
        (1000, "rm 'a b'", "$"),
        (1000, "systemctl --user restart upcall-daemon.service", "$"),
        (1000, "upcall key generate", "$"),
        (0, "upcall key generate", "#"),
    ],
)
def test_a_command_that_root_must_run_is_shown_after_a_hash(
    monkeypatch: pytest.MonkeyPatch, uid: int, command: str, prompt: str
) -> None:
    command = command.replace("OURS", str(os.getpid()))
    monkeypatch.setattr("os.geteuid", lambda: uid)
    _, text = run(monkeypatch, [check(problem("bad", "", command))], "--quiet")
    assert text.splitlines()[-1] == f"    {prompt} {command}"


def test_findings_are_printed_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = run(monkeypatch, [check(note("a note", "think")), check(problem("bad"))], "--json")
    assert code == 1
    assert json.loads(text)[0] == {"check": "it", "state": NOTE, "what": "a note", "remedy": "think", "command": ""}


def test_doctors_help_names_the_labs_doctor() -> None:
    assert "upcall lab doctor" in (upcall.cli.doctor.command.help or "")

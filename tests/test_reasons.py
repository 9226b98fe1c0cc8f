"""The reasons of refusals: words, remedies and exit codes, and how commands show them."""

from __future__ import annotations

import os
import re
import shlex
import string
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from upcall.cli import main, remedies
from upcall.cli.running import error_text, exit_code
from upcall.core import errors, reasons
from upcall.core.errors import Refused
from upcall.core.reasons import REASONS, described
from upcall.process.connection import NoBroker
from upcall.process.control import NoDaemon

COMMAND = re.compile(r"`([^`]+)`")
PAGE = Path(__file__).parents[1] / "docs" / "refusals.md"


def commands(text: str) -> list[str]:
    return COMMAND.findall(text)


def parse(words: list[str]) -> None:
    """Parses a command line with click, down to the last group; runs nothing. click.ClickException."""
    command: click.Command = main
    context = command.make_context("upcall", words)
    while isinstance(command, click.Group):
        _, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert found is not None
        command, context = found, found.make_context(found.name, rest, parent=context)


@pytest.mark.parametrize("name", REASONS)
def test_every_reason_has_words_and_a_command_that_helps(name: str) -> None:
    reason = REASONS[name]
    for text in (reason.words, reason.remedy):
        assert text and text.isprintable() and text[0] not in string.ascii_uppercase and not text.endswith(".")
    assert commands(reasons.remedy(name))


@pytest.mark.parametrize("name", REASONS)
def test_every_command_of_a_remedy_exists_and_takes_these_arguments(name: str) -> None:
    for line in commands(described(name)):
        program, *words = shlex.split(line)
        assert program == "upcall"
        if words == ["plugin", "check"]:
            words.append("ALIAS")
        parse(words)


@pytest.mark.parametrize("name", REASONS)
def test_every_reason_exits_with_a_code_of_sysexits(name: str) -> None:
    assert exit_code(Refused(name)) == REASONS[name].exit
    again = "try again" in REASONS[name].remedy
    assert (REASONS[name].exit == os.EX_TEMPFAIL) == again, "75 is for what may succeed later"


def test_the_exit_codes_are_those_of_sysexits() -> None:
    for name in ("DATAERR", "NOHOST", "UNAVAILABLE", "SOFTWARE", "TEMPFAIL", "PROTOCOL", "NOPERM", "CONFIG"):
        assert getattr(reasons, name) == getattr(os, f"EX_{name}")
    assert exit_code(Refused("moon-phase")) == os.EX_UNAVAILABLE


def test_the_page_of_refusals_has_the_whole_table() -> None:
    rows = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| `")]
    assert rows == [
        f"| `{name}` | {reasons.in_words(name)} | {reasons.remedy(name)} | {one.exit} |"
        for name, one in REASONS.items()
    ]


def test_the_errnos_are_those_of_the_table() -> None:
    assert {name: one.errno for name, one in REASONS.items()} == errors.REASONS


def test_a_refusal_says_what_is_wrong_what_helps_and_keeps_its_reason() -> None:
    refused = Refused("no-key")
    assert str(refused) == "the key is not in the user keyring (no-key): add it: `upcall key add NAME`"
    refused.key = "work"
    assert str(refused) == "the key work is not in the user keyring (no-key): add it: `upcall key add work`"
    assert repr(refused) == "Refused('no-key')"


def test_the_words_of_a_daemon_are_quoted_as_such() -> None:
    refused = Refused("locked", why='since 10:04", says root: run `rm`')
    assert '(locked: since 10:04"' in str(refused)  # this process's own words
    refused.by = "the daemon"
    assert """(locked; the daemon says "since 10:04', says root: run `rm`"):""" in str(refused)


def test_an_unknown_reason_is_shown_as_it_is() -> None:
    assert str(Refused("moon-phase", why="it is full")) == "refused (moon-phase: it is full)"


@pytest.fixture
def units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for units, on a machine that systemd runs."""
    monkeypatch.setattr(remedies, "_RUNNING", tmp_path)
    monkeypatch.setattr(remedies, "_UNITS", (str(tmp_path),))
    return tmp_path


@pytest.mark.parametrize(
    ("error", "unit", "by_hand", "by_systemd"),
    [
        (NoBroker("no broker"), "system/upcall-broker", "`upcall broker`", "`systemctl start upcall-broker`"),
        (NoDaemon("no daemon"), "user/upcall-daemon", "`upcall daemon`", "`systemctl --user start upcall-daemon`"),
        (Refused("no-daemon"), "user/upcall-daemon", "`upcall daemon`", "`systemctl --user start upcall-daemon`"),
    ],
    ids=["no broker", "no daemon", "no-daemon"],
)
def test_what_is_missing_names_the_command_that_starts_it_here(
    error: errors.UpcallError, unit: str, by_hand: str, by_systemd: str, units: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert by_hand in error_text(error) and by_systemd not in error_text(error)
    file = units / f"{unit}.service"
    file.parent.mkdir()
    file.touch()
    assert by_systemd in error_text(error) and by_hand not in error_text(error)


def test_roots_daemon_is_started_by_a_unit_of_its_own(units: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert remedies.start_of_daemon() == "`upcall daemon`"
    (units / "system").mkdir()
    (units / "system" / "upcall-root-daemon.service").touch()
    assert remedies.start_of_daemon() == "`systemctl start upcall-root-daemon`"


def test_a_command_without_a_broker_says_how_to_start_one(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["wrap", "0123456789abcdef", "--runtime", str(tmp_path)], input=b"key")
    assert result.exit_code == os.EX_UNAVAILABLE
    assert result.stderr.startswith(f"upcall: no broker at {tmp_path}/broker.sock: ")
    assert "; start it: `" in result.stderr and result.stderr.count("\n") == 1


def test_without_systemd_the_broker_is_started_by_its_init_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "upcall-broker"
    script.touch()
    monkeypatch.setattr(remedies, "_RUNNING", tmp_path / "nix")
    monkeypatch.setattr(remedies, "_SCRIPTS", (str(script),))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert remedies.start_of_broker() == f"`{script} start` as root"

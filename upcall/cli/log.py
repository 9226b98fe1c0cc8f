"""`upcall log`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import click

from upcall.cli import completing, for_terminal, output
from upcall.cli.parameter_types import OUTCOME, SERVICE, UID
from upcall.core.errors import PeerError, UpcallError
from upcall.observe.tail import lines
from upcall.process import machine
from upcall.process import start_python as startpython
from upcall.wire.record import MESSAGE_ID, Record, RecordSource, take_journal, take_line

JOURNALCTL = "journalctl"
_HEAD = ("time", "who", "uid", "service", "outcome", "ms", "seq", "handler")
_NONE = (
    "there are no records: they are off by default; [log] requests = true in the configuration turns them on, "
    "or --log-requests journal of `upcall broker` and `upcall daemon`"
)
_WIDTHS = (23, 7, 6, 13, 15, 10, 11, 1)


class _Wanted(NamedTuple):
    uid: int | None
    service: str | None
    outcome: str | None

    def fits(self, record: Record) -> bool:
        return (
            self.uid in (None, record.uid)
            and self.service in (None, record.service)
            and self.outcome in (None, record.outcome)
        )


class _Told(NamedTuple):
    source: RecordSource
    record: Record


@click.command("log")
@click.option("--follow", "-f", is_flag=True, help="Print further records as they are written, until Ctrl-C.")
@click.option("--uid", type=UID, metavar="UID", help="Of this uid's daemon only.")
@click.option(
    "--service",
    type=SERVICE,
    metavar="SERVICE",
    shell_complete=completing.services,
    help="Of this service only, such as key or cifs.spnego.",
)
@click.option(
    "--outcome",
    type=OUTCOME,
    metavar="OUTCOME",
    shell_complete=completing.outcomes,
    help='With this outcome only: "answered", or the reason of a refusal.',
)
@click.option("--json", "as_json", is_flag=True, help="As JSON, for programs: one object in each line.")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path), required=False)
def command(
    follow: bool, uid: int | None, service: str | None, outcome: str | None, as_json: bool, file: Path | None
) -> None:
    """Show the outcome of each request, from FILE (- is standard input) or from systemd's journal.

    Broker and daemon record requests if `--log-requests` or [log] in the configuration says so. The broker's record
    has the total time, the daemon's its own; both have the same sequence number. Damaged records are skipped and
    counted, and so are entries of the journal that another user wrote in the broker's or daemon's name.

    \b
    Exit codes: 0 shown, even if there are no records, and after Ctrl-C with --follow; 66 there is no such file;
    69 journalctl is missing or failed.

    \b
    Examples:
      $ upcall log --follow
      # upcall log --outcome no-ticket --uid 1000
      $ upcall log --json /var/log/upcall/requests
    """
    wanted, damaged, seen = _Wanted(uid, service, outcome), 0, 0
    show = _show_json if as_json else _show_row
    if not as_json:
        click.echo(_row(_HEAD))
    try:
        for found in _journal(follow) if file is None else _file(file, follow):
            seen += 1
            if found is None:
                damaged += 1
            elif wanted.fits(found.record):
                show(found)
    except KeyboardInterrupt:
        if not follow:
            raise
    if not seen:
        output.note(_NONE if file is None else f"there are no records in {for_terminal(str(file))}")
    if damaged:
        click.echo(f"{damaged} damaged record{'s' if damaged > 1 else ''} passed over", err=True)


def _file(path: Path, follow: bool) -> Iterator[_Told | None]:
    """Yields the records of a file; None for a damaged one."""
    found = iter(sys.stdin) if str(path) == "-" else lines(path, follow)
    for line in found:
        if line is not None:
            yield from _taken(lambda line=line: take_line(line.rstrip("\n")))  # type: ignore[misc]


def _journal(follow: bool) -> Iterator[_Told | None]:
    environment = startpython.cleaned()
    program = shutil.which(JOURNALCTL, path=environment.get("PATH"))
    if program is None:
        raise NoJournal("there is no journalctl here: give the file to which requests are logged")
    own, machine_uid = os.geteuid(), machine.uid()
    command = [program, "--output=json", "--no-pager", "--quiet", f"MESSAGE_ID={MESSAGE_ID}"]
    if follow:
        command += ["--follow", "--lines=100"]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment, text=True, errors="replace"
    ) as one:
        try:
            assert one.stdout is not None  # noqa: S101 - it is a pipe
            for line in one.stdout:
                yield from _taken(lambda line=line: take_journal(_object(line), own, machine_uid))  # type: ignore[misc]
        finally:
            one.terminate()
    if one.returncode > 0:
        raise NoJournal(f"journalctl ended with {one.returncode}: see what it says")


class NoJournal(UpcallError):
    """There is no journal on this machine, or it cannot be read."""


def _object(line: str) -> dict[str, object]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        raise PeerError("journal", "a line is no JSON") from None
    if not isinstance(found, dict):
        raise PeerError("journal", "a line is no JSON object")
    return found


def _taken(take: Callable[[], tuple[RecordSource, Record] | None]) -> Iterator[_Told | None]:
    try:
        found = take()
    except PeerError:
        yield None
        return
    if found is not None:
        yield _Told(*found)


def _show_json(told: _Told) -> None:
    click.echo(json.dumps({"who": told.source.name, "pid": told.source.pid, **told.record._asdict()}))


def _show_row(told: _Told) -> None:
    record = told.record
    when = datetime.fromtimestamp(record.at).isoformat(" ", "milliseconds")
    who = told.source.name.removeprefix("upcall-")
    figures = (str(record.uid), record.service, record.outcome, f"{record.seconds * 1e3:.3f}", str(record.seq))
    click.echo(_row((when, who, *figures, record.handler)))


def _row(cells: tuple[str, ...]) -> str:
    """Formats one line with fixed columns: a followed log has no end by which to measure columns."""
    return for_terminal("  ".join(cell.ljust(width) for cell, width in zip(cells, _WIDTHS, strict=True)).rstrip())

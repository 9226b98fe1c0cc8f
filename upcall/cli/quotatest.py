"""`upcall quota test`: sends a test message through each sink of this user."""

from __future__ import annotations

import json
import os
import pwd
import threading
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import click

from upcall import config
from upcall.cli import completing, output
from upcall.cli.output import Cell
from upcall.cli.tracebacks import TRACEBACK
from upcall.cli.tracebacks import show as show_trace
from upcall.core.errors import UpcallError, UsageError
from upcall.core.suggestion import did_you_mean
from upcall.process import machine
from upcall.protocols.quota.notice import SPACE, TEST, USER, Cause, Filesystem, QuotaNotice, Subject, sentence
from upcall.sink import ClosableSink, Sink

PATIENCE = 30.0  # seconds, the time-out of each sink; all run in parallel
TOLD, FAILED, LATE = "told", "failed", "not in time"


class Outcome(NamedTuple):
    """The result of one sink. `why`: "" if it has delivered the message."""

    sink: str
    outcome: str
    why: str
    seconds: float
    trace: str = ""  # the traceback of the exception of a sink that is broken


@click.command("test")
@click.option(
    "--sink",
    "only",
    multiple=True,
    metavar="NAME",
    shell_complete=completing.sinks,
    help="Only this sink, even if it is not used.",
)
@click.option("--json", "as_json", is_flag=True, help="As JSON, for programs.")
@TRACEBACK
@click.pass_context
def command(context: click.Context, only: tuple[str, ...], as_json: bool, show_traceback: bool) -> None:
    """Send yourself a test message through each sink.

    This process sends it, in its own environment: whether the daemon can reach your desktop depends on the daemon's
    environment. Failed deliveries are not retried. For root, the process becomes the user of the machine's daemon
    first, and has that daemon's credentials.

    \b
    Exit codes: 0 every sink has delivered; 64 there is no such sink; 69 a sink has failed; 78 the configuration
    is invalid.

    \b
    Examples:
      $ upcall quota test
      $ upcall quota test --sink mail
    """
    try:
        from upcall_quota import sinks
    except ImportError:
        raise UsageError("the plugin upcall-quota is not installed, and without it no message is delivered") from None
    become_machines()
    settings = config.settings(sinks.TABLE, user=True)
    chosen = sinks.chosen(settings, os.geteuid())
    if unknown := sorted(set(only) - sinks.known()):
        suggested = did_you_mean(unknown[0], sinks.known())
        raise UsageError(
            f"there is no sink '{unknown[0]}'{suggested or ': there are ' + ', '.join(sorted(sinks.known()))}"
        )
    openers = {name: sinks.opener(name, settings) for name in only} or chosen
    outcomes = tell_all(openers, trial(os.geteuid(), int(time.time())))
    if as_json:
        rows = [{name: value for name, value in one._asdict().items() if name != "trace"} for one in outcomes]
        click.echo(json.dumps(rows, indent=2))
    else:
        _show(outcomes)
    for one in outcomes:
        if show_traceback and one.trace:
            show_trace(one.trace)
    if any(one.outcome != TOLD for one in outcomes):
        context.exit(os.EX_UNAVAILABLE)


def become_machines() -> None:
    """Drops root's privileges for those of the machine's daemon, because replies of mail servers are parsed here.
    ConfigError."""
    if os.geteuid() != machine.ROOT or machine.uid() == machine.ROOT:
        return
    user = pwd.getpwuid(machine.uid())
    os.environ.update({"HOME": user.pw_dir, **machine.handed_over()})
    os.setgroups(os.getgrouplist(user.pw_name, user.pw_gid))
    os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
    os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)


def trial(uid: int, now: int) -> QuotaNotice:
    """Returns a test notice for this user. `now`: seconds since 1970."""
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = str(uid)
    return QuotaNotice(
        event=TEST, resource=SPACE, subject=Subject(USER, uid, name), cause=Cause(uid, name),
        filesystem=Filesystem("/", "none", "none"), used=0, soft=0, hard=0, grace_until=None, percent=None, at=now,
    )  # fmt: skip


def tell_all(openers: dict[str, Callable[[], Sink]], notice: QuotaNotice) -> list[Outcome]:
    """Delivers the notice to all sinks, each in a thread of its own, so that a sink that hangs does not block
    others."""
    text = sentence(notice, notice.at, notice.subject.id)
    results: dict[str, Outcome] = {}

    def tell(name: str, opener: Callable[[], Sink]) -> None:
        start, why, trace = time.monotonic(), "", ""
        try:
            sink = opener()
            try:
                sink.tell(notice, text)
            finally:
                if isinstance(sink, ClosableSink):
                    sink.close()
        except UpcallError as error:
            why = str(error)
        except BaseException as error:  # noqa: BLE001 - a sink may raise anything
            import traceback  # rarely needed

            why, trace = f"it is broken: {type(error).__name__}", "".join(traceback.format_exception(error))
        results[name] = Outcome(name, FAILED if why else TOLD, why, time.monotonic() - start, trace)

    threads = [threading.Thread(target=tell, args=item, daemon=True) for item in openers.items()]
    end = time.monotonic() + PATIENCE
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    late = {name: Outcome(name, LATE, f"nothing within {PATIENCE:.0f} s", PATIENCE) for name in openers}
    return [results.get(name, late[name]) for name in openers]


def _show(outcomes: Iterable[Outcome]) -> None:
    rows = []
    for one in outcomes:
        style = {} if one.outcome == TOLD else {"fg": "red"}
        rows.append([Cell(text, style) for text in (one.sink, one.outcome, one.why)])
    output.table(("sink", "outcome", "why"), rows)

"""`upcall quota`: shows quotas and the kernel's warnings, tests their delivery, and runs the quota source."""

from __future__ import annotations

import importlib.util
import json
import os
import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click

from upcall.cli import completing, output
from upcall.cli.commands import Group
from upcall.cli.output import Cell, Column
from upcall.cli.parameter_types import FOLDER, Seconds
from upcall.core.errors import PeerError, UsageError
from upcall.kernel import quotactl
from upcall.kernel.genetlink import Listener, look_up
from upcall.kernel.mounts import Mount, Names, mounts, project_number
from upcall.process import start_python as startpython
from upcall.process.settings import dumps
from upcall.protocols.quota import warning as quota
from upcall.protocols.quota.notice import FILES, KINDS, MAX_ID, SPACE, amount, duration, moment, printable
from upcall.protocols.quota.settings import SourceSettings
from upcall.protocols.quota.warning import Figures, Warned

_JSON = click.option("--json", "as_json", is_flag=True, help="As JSON, for programs.")


_TEST = "upcall.cli.quotatest"


class _Group(Group):
    """A group that imports `test` only when it is called, because it loads the handler's libraries."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *(["test"] if importlib.util.find_spec(_TEST) else [])]

    def find(self, ctx: click.Context, name: str) -> click.Command | None:
        if name != "test" or not importlib.util.find_spec(_TEST):
            return super().find(ctx, name)
        found = importlib.import_module(_TEST).command
        return found if isinstance(found, click.Command) else None


@click.group(cls=_Group)
def command() -> None:
    """Show quotas, watch the kernel's warnings, and test whether they reach you. For root: receive them."""


# --- serve -------------------------------------------------------------------------------------------------------


@command.command(short_help="Run the process that receives the kernel's warnings.")
@click.option(
    "--runtime",
    type=FOLDER,
    help="The broker's folder.  [default: /run/upcall]",
)
def serve(runtime: Path | None) -> None:
    """Run the quota source: it receives the kernel's quota warnings and sends notices through root's broker.

    For root; `upcall setup` makes a service of it (upcall-quota.service). It runs in the foreground until SIGTERM,
    SIGINT or SIGHUP. Without a broker it keeps listening, and delivers when there is one. Its state is in
    /var/lib/upcall/quota.json, or in the folder that --runtime names.

    \b
    Exit codes: 0 ended as asked; 69 it could not start; 78 others could change what root would run, or the
    configuration is wrong.

    \b
    Examples:
      # upcall quota serve
    """
    settings = SourceSettings(None if runtime is None else runtime.absolute())
    words = startpython.command("upcall.protocols.quota", dumps(settings))
    os.execve(words[0], words, startpython.cleaned())  # noqa: S606


# --- status ------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One quota of one resource."""

    mount: Mount
    kind: int
    id: int
    resource: str
    figures: Figures


@command.command(short_help="Show usage and limits.")
@click.option("--user", type=str, metavar="NAME", shell_complete=completing.users, help="Of this user (for root).")
@click.option("--group", type=str, metavar="NAME", shell_complete=completing.groups, help="Of this group.")
@click.option("--project", type=str, metavar="NAME", help="Of this project (for root).")
@click.option("--all", "everybody", is_flag=True, help="Of all users who have a limit (for root).")
@_JSON
def status(user: str | None, group: str | None, project: str | None, everybody: bool, as_json: bool) -> None:
    """Show usage and limits: yours and your groups', on every filesystem that has quotas.

    \b
    Exit codes: 0 shown; 64 there is no such name; 77 only root may look at that.
    """
    whose = _whose(user, group, project)
    try:
        rows = list(_rows(whose, everybody))
    except PermissionError as error:
        raise UsageError("other people's quotas are for root to see") from error
    names = Names()
    if as_json:
        click.echo(json.dumps([_as_data(row, names) for row in rows], indent=2))
    elif rows:
        _show(rows, names)
    else:
        click.echo("no limits")


def _whose(user: str | None, group: str | None, project: str | None) -> list[tuple[int, int]]:
    """Returns (kind of quota, id) of the given users, groups and projects, by name or number; by default the caller's
    own."""
    import grp
    import pwd

    looks: tuple[Callable[[str], int], ...] = (
        lambda name: pwd.getpwnam(name).pw_uid,
        lambda name: grp.getgrnam(name).gr_gid,
        project_number,
    )
    asked = []
    for kind, (name, look) in enumerate(zip((user, group, project), looks, strict=True)):
        if name is None:
            continue
        try:
            number = int(name) if name.isascii() and name.isdecimal() else look(name)
        except (KeyError, OSError, ValueError):
            number = -1
        if not 0 <= number <= MAX_ID:
            raise UsageError(f"there is no {KINDS[kind]} {name!r}")
        asked.append((kind, number))
    groups = sorted({os.getegid(), *os.getgroups()} - {0})
    return asked or [(quotactl.USER, os.geteuid()), *((quotactl.GROUP, gid) for gid in groups)]


def _rows(whose: list[tuple[int, int]], everybody: bool) -> Iterator[Row]:
    for mount, kinds in quotactl.with_quotas(mounts()).items():
        try:
            with quotactl.opened(mount) as filesystem:
                for kind in kinds:
                    yield from _rows_of(mount, filesystem, kind, whose, everybody)
        except PermissionError:
            raise
        except OSError as error:  # unmounted meanwhile, or faulty: show the other ones
            click.echo(f"{printable(mount.point)}: {error.strerror}", err=True)


def _rows_of(
    mount: Mount, filesystem: quotactl.Filesystem, kind: int, whose: list[tuple[int, int]], everybody: bool
) -> Iterator[Row]:
    mine = (filesystem.get(kind, number) for of, number in whose if of == kind)
    for one in _everybody(filesystem, kind) if everybody else mine:
        for resource in (SPACE, FILES):
            figures = one.of(resource)
            if figures.soft or figures.hard:
                yield Row(mount, kind, one.id, resource, figures)


def _everybody(filesystem: quotactl.Filesystem, kind: int) -> Iterator[quota.Quota]:
    following = 1  # id 0 is not subject to limits
    while following <= 0xFFFFFFFF and (found := filesystem.next(kind, following)) is not None:
        yield found
        following = found.id + 1


def _as_data(row: Row, names: Names) -> dict[str, Any]:
    return {
        "mount": row.mount.point,
        "device": row.mount.source,
        "type": row.mount.type,
        "kind": KINDS[row.kind],
        "id": row.id,
        "name": names.subject(row.kind, row.id),
        "resource": row.resource,
        **row.figures._asdict(),
        "grace_until": row.figures.grace_until or None,
    }


def _show(rows: list[Row], names: Names) -> None:
    lines = []
    now = time.time()
    for row in rows:
        used, soft, hard, _ = row.figures
        limit = soft or hard
        over = bool((soft and used > soft) or (hard and used >= hard))
        style = {"fg": "red" if over else "yellow" if used * 10 >= limit * 9 else "green"}
        lines.append(
            (
                printable(row.mount.point),
                f"{KINDS[row.kind]} {printable(names.subject(row.kind, row.id))}",
                Cell(amount(used, row.resource), style),
                Cell(f"{used * 100 // limit} %", style),
                amount(soft, row.resource) if soft else "-",
                amount(hard, row.resource) if hard else "-",
                _grace(row.figures, now) if over else "",
            )
        )
    output.table(_COLUMNS, lines)


_COLUMNS = (
    Column("filesystem"),
    Column("whose"),
    Column("used", right=True),
    Column("%", right=True, optional=True),
    Column("soft", right=True),
    Column("hard", right=True),
    Column("grace"),
)


def _grace(figures: Figures, now: float) -> str:
    """Formats the remaining grace time of a quota that exceeds its soft limit."""
    used, _, hard, until = figures
    if (hard and used >= hard) or 0 < until <= now:
        return "nothing more can be written"
    return f"{duration(until - now)} left, until {moment(until)}" if until else ""


# --- watch -------------------------------------------------------------------------------------------------------

_SAYS = {
    quota.IHARDWARN: "no more files can be made",
    quota.ISOFTLONGWARN: "too many files for too long",
    quota.ISOFTWARN: "too many files",
    quota.BHARDWARN: "nothing more can be written",
    quota.BSOFTLONGWARN: "too much space for too long",
    quota.BSOFTWARN: "too much space",
    quota.IHARDBELOW: "files can be made again",
    quota.ISOFTBELOW: "not too many files any more",
    quota.BHARDBELOW: "something can be written again",
    quota.BSOFTBELOW: "not too much space any more",
}


@command.command(short_help="Show the kernel's warnings as they come.")
@_JSON
@click.option("--count", type=click.IntRange(1), metavar="N", help="End after N warnings.")
@click.option("--timeout", type=Seconds(above=True), metavar="SECONDS", help="End after this time.")
def watch(as_json: bool, count: int | None, timeout: float | None) -> None:
    """Show the kernel's warnings as they come: yours, and those that you caused; for root, those of all users.

    Equal warnings in a row are shown once, with their number. It needs no broker and no privileges, only the initial
    network namespace.

    \b
    Exit codes: 0 ended as asked; 64 this kernel, or this network namespace, has no quota warnings.
    """
    ids = look_up(quota.FAMILY, quota.GROUP)
    listener = Listener(ids.group)
    output.note("watching; Ctrl-C ends it")
    names, shown = Names(), 0
    try:
        for warned, number, lost in _warnings(listener, ids.family, timeout):
            if warned is None:
                click.echo(f"{lost} lost: more than could be read", err=True)
                continue
            _print(warned, number, names, as_json)
            shown += 1
            if count is not None and shown >= count:
                return
    except KeyboardInterrupt:
        pass
    finally:
        listener.close()


def _warnings(listener: Listener, family: int, timeout: float | None) -> Iterator[tuple[Warned | None, int, int]]:
    """Yields (warning, number of equal ones, 0), or (None, 0, number lost), as they arrive."""
    from upcall.protocols.quota.coalescing import Folding

    folding, lost = Folding(family), 0
    end = None if timeout is None else time.monotonic() + timeout
    me = os.geteuid()
    while True:
        left = None if end is None else end - time.monotonic()
        if (left is not None and left <= 0) or not select.select([listener], [], [], left)[0]:
            return
        folding.add(listener.receive(1024))
        if folding.sequence.lost > lost:
            yield None, 0, folding.sequence.lost - lost
            lost = folding.sequence.lost
        for data, number in folding.take().items():
            try:
                warned = quota.take_attributes(data)
            except PeerError:
                continue
            if me in (0, warned.caused_id) or (warned.qtype == quota.USER and warned.excess_id == me):
                yield warned, number, 0


def _print(warned: Warned, number: int, names: Names, as_json: bool) -> None:
    known = warned.qtype < len(KINDS) and max(warned.excess_id, warned.caused_id) <= 0xFFFFFFFF
    kind = KINDS[warned.qtype] if known else f"kind {warned.qtype}"
    name = names.subject(warned.qtype, warned.excess_id) if known else str(warned.excess_id)
    device = os.makedev(warned.major & 0xFFFFFFF, warned.minor)
    mount = next((one.point for one in mounts() if one.device == device), None)
    if as_json:
        told = {**warned._asdict(), "kind": kind, "name": name, "mount": mount, "count": number, "at": time.time()}
        click.echo(json.dumps(told))
        return
    where = printable(mount) if mount else f"device {warned.major}:{warned.minor}"
    says = _SAYS.get(warned.warning, f"warning {warned.warning}")
    cause = f" (by {printable(names.user(warned.caused_id))})" if known else ""
    times = f" x{number}" if number > 1 else ""
    click.echo(f"{time.strftime('%H:%M:%S')} {where}: {kind} {printable(name)}: {says}{cause}{times}")

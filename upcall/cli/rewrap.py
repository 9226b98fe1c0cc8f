"""`upcall ecryptfs rewrap`: puts another of the user's keys into the headers of lower files."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import click

from upcall.cli import completing, error_text, exit_code, output
from upcall.cli.filekeys import FileKeys, concerns_all, mount_passphrase_options
from upcall.cli.keyshow import Target, target_of, token_in_keyring
from upcall.cli.output import for_terminal
from upcall.cli.parameter_types import runtime_option
from upcall.core.errors import UpcallError, UsageError
from upcall.kernel.mounts import Mount, mounts
from upcall.protocols.ecryptfs.lower_file import Inode, Walk
from upcall.protocols.ecryptfs.mounted import check_unmounted, lower_folders, mount_of
from upcall.protocols.ecryptfs.packets import is_signature
from upcall.protocols.ecryptfs.rewrap import Entry, Survey, Task, Wish, prove, rewrap
from upcall.protocols.ecryptfs.rewrap_journal import Journal, Recovery, default_folder, recover

_THREADS: Final = 4  # connections to the broker: more than a daemon has workers, so that none waits for the disk
_WORDS: Final = {
    "pending": "to rewrap",
    "rewrapped": "rewrapped",
    "current": "up to date",
    "other-key": "other keys",
    "not-encrypted": "not encrypted",
    "skipped": "skipped",
    "failed": "failed",
}


@click.command("rewrap", short_help="Change the key that opens lower files.")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PATH...")
@click.option("--to", "target", required=True, metavar="KEY", shell_complete=completing.keys, help="The new key.")
@click.option(
    "--from",
    "source",
    metavar="KEY",
    shell_complete=completing.keys,
    help="The key to replace, by name or signature. By default any of yours that opens the file.",
)
@click.option("-r", "--recursive", is_flag=True, help="Also the files below folders.")
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be done, try both keys, and change nothing.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask. Needed where there is no terminal.")
@click.option("--keep", is_flag=True, help="Keep the old key in the header, too: either one opens the file.")
@click.option("--across", is_flag=True, help="Also files on other filesystems below PATH.")
@click.option("--mounted", is_flag=True, help="Although eCryptfs has the folder mounted. Files in use are left alone.")
@mount_passphrase_options
@click.option("--journal", type=click.Path(file_okay=False, path_type=Path), help="Folder of the crash journal.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, for programs.")
@runtime_option()
@click.pass_context
def command(ctx: click.Context, /, passphrase: bytearray | None, **options: Any) -> None:
    """Rewrap the file keys of lower files with the key of --to, which opens them from then on.

    Works on the *lower* files, without eCryptfs in the kernel, and writes only the packet with the wrapped key in each
    file's header: not the data, and not the names. Encrypted names stay encrypted with their own key. Your daemon
    unwraps each file's key with the old key and wraps it with the new one; both must be added (upcall key add). Files
    of a mount with a passphrase, as ecryptfs-utils makes them, are rewrapped with one of the --passphrase options.

    First shows what would be done, tries both keys, and asks. Each new header was unwrapped and compared before it is
    written. It can be interrupted at any time: run it again, and it goes on.

    \b
    Exit codes: 0 the new key opens all files; 1 the answer was no; 64 an option is wrong, there is no such key,
    or the folder is mounted; 65 a header is damaged, or a file is no lower file of eCryptfs; 66 a PATH is
    missing; 69 there is no broker or daemon, or a file's keys are not yours; 71 a disk error; 75 a file is in
    use, or the daemon is busy: run it again; 77 a key is locked, or a file is not yours.

    \b
    Examples:
      $ upcall ecryptfs rewrap -r ~/.Private --to default --dry-run
      $ upcall ecryptfs rewrap -r ~/.Private --from old --to default
      $ upcall ecryptfs rewrap -r ~/.Private --ask-passphrase --to default
    """
    keys = FileKeys(options["runtime"], passphrase)
    try:
        worst = _Run(keys, **options).run()
    finally:
        keys.close()
    if worst:
        ctx.exit(worst)


class _Run:
    """One call of the command."""

    def __init__(
        self,
        keys: FileKeys,
        *,
        paths: tuple[Path, ...],
        target: str,
        source: str | None,
        recursive: bool,
        dry_run: bool,
        yes: bool,
        keep: bool,
        across: bool,
        mounted: bool,
        journal: Path | None,
        as_json: bool,
        runtime: Path | None,
    ) -> None:
        self._keys, self._paths = keys, paths
        self._target = _added(target)
        self._wish = Wish(self._target.signature, None if source is None else _signature(source), keep)
        if self._wish.source == self._wish.target:
            raise UsageError("--from and --to are the same key")
        self._recursive, self._across, self._mounted = recursive, across, mounted
        self._dry_run, self._yes, self._as_json = dry_run, yes, as_json
        self._folder = default_folder() if journal is None else journal
        self._entries: dict[Path, Entry] = {}
        self._recovered: list[Recovery] = []
        self._codes: set[int] = set()
        self._lines = not as_json

    def run(self) -> int:
        """Returns the exit code."""
        with contextlib.ExitStack() as stack:
            walks = self._walks(stack)
            if not self._dry_run:
                if not self._yes and not (sys.stdin.isatty() and sys.stderr.isatty()):
                    if not walks:
                        return self._finish(True)  # no path could be opened, as was told
                    raise UsageError("no terminal to ask on: add --yes, or --dry-run to see what would be done")
                self._recover()
            survey = Survey(self._wish, self._keys)
            self._look(survey, walks)
            stopped = self._prove(survey.tasks)
            if stopped or self._dry_run or not survey.tasks:
                return self._finish(self._dry_run or bool(stopped))
            if not self._yes:
                self._say_counts()
                click.confirm(f"Rewrap {_files(len(survey.tasks))} to {self._target.name}?", err=True, abort=True)
            started = time.monotonic()
            self._rewrap(survey.tasks)
            return self._finish(False, time.monotonic() - started)

    # --- before ---------------------------------------------------------------------------------------------

    def _walks(self, stack: contextlib.ExitStack) -> list[Walk]:
        """Opens the paths. UsageError if one is mounted, or in a mounted folder."""
        known = mounts()
        lowers = lower_folders(known)
        closed: dict[Inode, str] = {}
        if not self._mounted:
            closed = {inode: f"eCryptfs has it mounted at {mount.point}" for inode, mount in lowers.folders.items()}
        walks = []
        for path in self._paths:
            if walk := self._walk(path, closed, stack):
                if above := mount_of(walk.device, known):
                    where = above.source if above.source.startswith("/") else "see `upcall mounts`"
                    raise UsageError(
                        f"{path} is in {above.point}, where eCryptfs shows files in clear: "
                        f"give the lower folder, {where}"
                    )
                if not self._mounted:
                    check_unmounted(path, walk.top, lowers)
                walks.append(walk)
        if not self._dry_run and any(mount.type == "ecryptfs" for mount in known):
            self._check_journal(known)
        return walks

    def _check_journal(self, known: list[Mount]) -> None:
        """UsageError if the journal would be in a folder that a crash might make unreadable."""
        existing = next(folder for folder in (self._folder, *self._folder.parents) if folder.exists())
        if mount_of(existing.stat().st_dev, known):
            raise UsageError(f"{self._folder} is on eCryptfs itself: name a folder elsewhere with --journal")

    def _walk(self, path: Path, closed: dict[Inode, str], stack: contextlib.ExitStack) -> Walk | None:
        try:
            walk = Walk(path, self._recursive, self._across, closed.items())
        except OSError as error:
            if isinstance(error, IsADirectoryError):
                raise UsageError(error_text(error)) from None
            self._add(Entry(path, "failed", error.strerror or "", error=error))
            return None
        stack.callback(walk.close)
        return walk

    def _recover(self) -> None:
        self._recovered = list(recover(self._folder))
        for entry in self._recovered:
            if entry.outcome == "restored" and self._lines:
                output.note(
                    f"{for_terminal(entry.path)}: its header was half written by an earlier run, and is restored"
                )
            elif entry.outcome == "unresolved":
                click.echo(f"{for_terminal(entry.path)}: an earlier run did not finish it: {entry.why}", err=True)
                self._codes.add(os.EX_DATAERR)

    def _look(self, survey: Survey, walks: list[Walk]) -> None:
        with _progress("looking", None, self._lines) as advance:
            for walk in walks:
                try:
                    for entry in survey.look(walk):
                        named = walk.is_file and entry.outcome == "not-encrypted"  # below a folder it is nothing wrong
                        self._add(entry._replace(outcome="failed") if named else entry)
                        advance()
                except OSError as error:
                    self._add(
                        Entry(Path(os.fsdecode(error.filename or "?")), "failed", error.strerror or "", error=error)
                    )

    def _prove(self, tasks: list[Task]) -> bool:
        """Tries the keys. Returns whether none of the files can be rewrapped now."""
        failures = prove(tasks, self._wish, self._keys)
        stopping = [entry for entry in failures if entry.error is not None and concerns_all(entry.error)]
        for entry in stopping or (failures if self._dry_run else ()):
            self._add(entry)
        return bool(stopping)

    # --- doing it -------------------------------------------------------------------------------------------

    def _rewrap(self, tasks: list[Task]) -> None:
        journal = Journal(self._folder)
        entries = rewrap(tasks, self._wish, self._keys, journal, threads=_THREADS, stops=concerns_all)
        try:
            with _progress("rewrapping", len(tasks), self._lines) as advance, contextlib.closing(entries):  # type: ignore[type-var]
                for entry in entries:
                    self._add(entry)
                    advance()
        except OSError as error:
            click.echo(f"upcall: {error_text(error)}", err=True)
            self._codes.add(os.EX_OSERR)
        except KeyboardInterrupt:
            click.echo("upcall: interrupted; run it again, and it goes on", err=True)
            raise
        finally:
            journal.close()

    # --- what became of it ----------------------------------------------------------------------------------

    def _add(self, entry: Entry) -> None:
        self._entries[entry.path] = entry
        if entry.outcome == "failed" and self._lines:
            click.echo(f"{for_terminal(str(entry.path))}: {for_terminal(entry.why)}", err=True)

    def _code(self, entry: Entry) -> int:
        if entry.outcome == "failed" and entry.error is not None:
            in_use = isinstance(entry.error, OSError) and entry.error.errno == errno.EBUSY
            return os.EX_TEMPFAIL if in_use else exit_code(entry.error)
        if entry.outcome == "other-key" and self._wish.source is None:
            return os.EX_UNAVAILABLE
        return os.EX_OK

    def _finish(self, unchanged: bool, seconds: float = 0.0) -> int:
        counts = self._counts()
        if self._as_json:
            report = {
                "to": {"name": self._target.name, "signature": self._target.signature},
                "dry_run": self._dry_run,
                "seconds": round(seconds, 3),
                "counts": counts,
                "recovered": [entry._asdict() for entry in self._recovered],
                "files": [_plain(entry) for entry in self._entries.values()],
            }
            click.echo(json.dumps(report, indent=2))
        else:
            self._say_counts(seconds)
            if unchanged:
                click.echo("nothing was changed")
        codes = self._codes | {self._code(entry) for entry in self._entries.values()}
        return os.EX_DATAERR if os.EX_DATAERR in codes else max(codes, default=0)

    def _counts(self) -> dict[str, int]:
        counts = Counter(entry.outcome for entry in self._entries.values())
        return {outcome: counts[outcome] for outcome in _WORDS}

    def _say_counts(self, seconds: float = 0.0) -> None:
        details: dict[str, Counter[str]] = {outcome: Counter() for outcome in _WORDS}
        for entry in self._entries.values():
            if entry.outcome in ("pending", "rewrapped"):
                details[entry.outcome][f"from {entry.old}"] += 1
            elif entry.outcome in ("skipped", "other-key"):
                details[entry.outcome]["another name of a file" if " name of " in entry.why else entry.why] += 1
        for outcome, count in self._counts().items():
            if count or outcome == "rewrapped":
                shown = ", ".join(_detail(details[outcome]))
                rate = f"{count / seconds:.0f} files/s" if outcome == "rewrapped" and seconds > 0 else ""
                rest = "; ".join(part for part in (shown, rate) if part)
                click.echo(f"{_WORDS[outcome]:<14} {count:>7}  {for_terminal(rest)}".rstrip())


def _detail(reasons: Counter[str]) -> list[str]:
    """Returns the most frequent reasons; with numbers if there are several."""
    if len(reasons) == 1:
        return [*reasons]
    rest = sum(number for _, number in reasons.most_common()[3:])
    return [f"{number} {why}" for why, number in reasons.most_common(3)] + ([f"{rest} others"] if rest else [])


def _plain(entry: Entry) -> dict[str, Any]:
    found: dict[str, Any] = {"file": str(entry.path), "outcome": entry.outcome, "from": entry.old or None}
    found["why"] = entry.why or None
    where = getattr(entry.error, "where", None)
    return found if where is None else {**found, "at": where}


def _added(name: str) -> Target:
    """Returns the key, which must be in the user keyring. UsageError."""
    key = target_of(name)
    if token_in_keyring(key.signature) is None:
        raise UsageError(f"the key {key.name} is not added: upcall key add {key.name}")
    return key


def _signature(name: str) -> str:
    """A signature needs no key of this user's: it may be that of a passphrase."""
    try:
        return target_of(name).signature
    except UpcallError:
        if is_signature(name):
            return name
        raise


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


@contextlib.contextmanager
def _progress(what: str, total: int | None, shown: bool) -> Iterator[Any]:
    """Yields a function that counts one more file. Shows a bar on a terminal only."""
    if not shown or output.quiet() or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=output.console(err=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)

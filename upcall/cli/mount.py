"""`upcall mount`, `upcall umount` and `upcall mounts`: a user's eCryptfs mounts, without root."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import click

from upcall.cli import completing, output
from upcall.cli.commands import Group
from upcall.cli.output import Column, for_terminal
from upcall.cli.running import error_text
from upcall.core.errors import PeerError, UpcallError, UsageError
from upcall.kernel import keyring, procfs
from upcall.keys.mounts import EVENTS, MountEntry, MountStore, check_mount_name
from upcall.keys.store import Entry, KeyStore
from upcall.process import start_python as startpython
from upcall.process.paths import SYSTEM_FOLDER
from upcall.process.settings import dumps
from upcall.protocols.ecryptfs.mounting.client import MountRefused, NoMountSource, ask_mount, ask_unmount, mounted
from upcall.protocols.ecryptfs.mounting.messages import MOUNT, MountRequest
from upcall.protocols.ecryptfs.mounting.settings import MountSettings
from upcall.protocols.ecryptfs.packets import is_signature

_NAME = click.argument("name", shell_complete=completing.mounts)
_RUNTIME = click.option(
    "--runtime",
    type=click.Path(file_okay=False, path_type=Path),
    default=SYSTEM_FOLDER,
    help="The folder of the service's socket.  [default: /run/upcall]",
)
_COLUMNS: Final = (
    "NAME",
    "MOUNTED",
    "UPPER",
    Column("LOWER", optional=True),
    Column("KEY", optional=True),
    Column("AUTO", optional=True),
    Column("UNMOUNTED ON", optional=True),
)
_WHO: Final = 8  # processes that are named
_YES = click.option("--yes", is_flag=True, help="Do not ask.")


@click.command("mount")
@click.argument("name", required=False, shell_complete=completing.mounts)
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path), metavar="[LOWER UPPER]")
@click.option(
    "--key",
    "keys",
    multiple=True,
    metavar="KEY",
    shell_complete=completing.keys,
    help="The key, by name or signature; with several, each opens what is written.  [default: default]",
)
@click.option("--key-bytes", type=click.Choice(["16", "24", "32"]), help="Of new files' AES keys.  [default: 16]")
@click.option("--names-key", metavar="SIGNATURE", help="Encrypt file names, with this passphrase's auth token.")
@click.option("--create", is_flag=True, help="Make the folders, if they are missing, without asking.")
@click.option("--auto/--no-auto", default=None, help="Have your daemon mount it at each login, or not.")
@click.option(
    "--on-lock/--no-on-lock", default=None, help="Unmount it when the screen is locked, or the machine sleeps."
)
@click.option("--on-logout/--no-on-logout", default=None, help="Unmount it at your last logout.")
@click.option("--login", is_flag=True, hidden=True)
@_RUNTIME
@click.pass_context
def mount(
    ctx: click.Context,
    name: str | None,
    folders: tuple[Path, ...],
    keys: tuple[str, ...],
    key_bytes: str | None,
    names_key: str | None,
    create: bool,
    auto: bool | None,
    on_lock: bool | None,
    on_logout: bool | None,
    login: bool,
    runtime: Path,
) -> None:
    """Mount an encrypted folder: what is written to UPPER is stored in LOWER, encrypted with your key.

    The first time, NAME, LOWER and UPPER are given, and remembered; from then on NAME suffices. Both folders must be
    your own, and UPPER must be empty. No root is needed, but an administrator has to allow it: see upcall-mounts(1).

    \b
    Exit codes: 0 it is mounted; 64 an argument is wrong; 66 a folder is missing; 69 mounting is off, its service
    does not run, or there is no such key; 75 try again later; 77 it is not allowed.

    \b
    Examples:
      $ upcall mount private ~/.private ~/private
      $ upcall mount private
      $ upcall mount private --auto --on-logout
    """
    store = MountStore()
    if login:
        ctx.exit(_mount_at_login(store, runtime))
    if name is None:
        raise UsageError("which mount? `upcall mounts` lists them; a new one: `upcall mount NAME LOWER UPPER`")
    entry = _entry(store, name, folders, keys, key_bytes, names_key)
    entry = entry._replace(
        auto=entry.auto if auto is None else auto,
        unmount_on=_events(entry, {"lock": on_lock, "logout": on_logout}),
    )
    store.check(entry)
    where = mounted(os.getuid()).get(name)
    if where is None:
        with contextlib.ExitStack() as undone:
            undone.callback(_take_back, _make_folders(entry, create))
            _add_keys(ctx, entry)
            try:
                where = _ask(entry, runtime)
            except MountRefused as refused:
                click.echo(f"upcall: {for_terminal(str(refused))}", err=True)
                ctx.exit(refused.status)
            undone.pop_all()
        output.done(f"{name}: mounted on {for_terminal(where)}")
        _warn_without_daemon()
    else:
        output.done(f"{name}: is mounted on {for_terminal(where)}")
    if store.find(name) != entry:
        store.save(entry)


def _ask(entry: MountEntry, runtime: Path) -> str:
    request = MountRequest(MOUNT, entry.name, entry.signatures, entry.key_bytes, entry.names_signature)
    with _remedy_of_no_source():
        return ask_mount(request, Path(entry.lower), Path(entry.upper), runtime)


def _mount_at_login(store: MountStore, runtime: Path) -> int:
    """Mounts what is marked `auto`; for the daemon. Nobody is asked for anything. Returns the exit status."""
    from upcall.protocols.ecryptfs.auto_add import add_token

    here, status = mounted(os.getuid()), 0
    keyring.ensure_user_keyring_linked()
    for entry in store.all():
        if not entry.auto or entry.name in here:
            continue
        try:
            for signature in entry.signatures:
                add_token(KeyStore().find(signature))
            _ask(entry, runtime)
        except (UpcallError, OSError) as error:
            click.echo(f"upcall: {entry.name}: {for_terminal(error_text(error))}", err=True)
            status = os.EX_UNAVAILABLE
    return status


def _entry(
    store: MountStore,
    name: str,
    folders: Sequence[Path],
    keys: Sequence[str],
    key_bytes: str | None,
    names_key: str | None,
) -> MountEntry:
    """Returns the mount as it is remembered or as it is given. UsageError if these contradict each other."""
    check_mount_name(name)
    if len(folders) not in (0, 2):
        raise UsageError("LOWER and UPPER are both given, or neither: `upcall mount NAME LOWER UPPER`")
    if names_key is not None and not is_signature(names_key):
        raise UsageError(f"--names-key {names_key}: a signature of 16 hexadecimal digits is needed")
    known = store.find(name)
    if known is None and not folders:
        store.load(name)  # raises UsageError
    lower, upper = map(_absolute, folders) if folders else ("", "")
    if known is not None:
        if folders and (lower, upper) != (known.lower, known.upper):
            raise UsageError(
                f"{name!r} is {known.upper} over {known.lower}: use another name, or `upcall mounts forget {name}`"
            )
        entry = known
    else:
        entry = MountEntry(name, lower, upper, ())
    if keys or not entry.signatures:
        store_of_keys = KeyStore()
        entry = entry._replace(signatures=tuple(_key(store_of_keys, key).signature for key in keys or ("default",)))
    if key_bytes is not None:
        entry = entry._replace(key_bytes=int(key_bytes))
    return entry if names_key is None else entry._replace(names_signature=names_key)


def _key(store: KeyStore, name: str) -> Entry:
    try:
        return store.find(name)
    except UsageError:
        if name == "default":
            raise UsageError(
                "you have no key called default: `upcall key generate` makes it, or name one: --key"
            ) from None
        raise


def _events(entry: MountEntry, given: dict[str, bool | None]) -> tuple[str, ...]:
    wanted = {event: event in entry.unmount_on if given[event] is None else given[event] for event in EVENTS}
    return tuple(event for event, on in wanted.items() if on)


def _absolute(path: Path) -> str:
    return os.path.abspath(path)  # noqa: PTH100 - resolve() would follow symbolic links


def _make_folders(entry: MountEntry, create: bool) -> list[str]:
    """Makes the folders that are missing. Returns them."""
    missing = [path for path in (entry.lower, entry.upper) if not os.path.lexists(path)]
    if missing and not create:
        if not sys.stdin.isatty():
            raise FileNotFoundError(errno.ENOENT, "is not there: --create makes it", missing[0])
        click.confirm(f"Make {' and '.join(missing)}?", default=True, abort=True, err=True)
    for path in missing:
        Path(path).mkdir(0o700, parents=True)
    return missing


def _take_back(made: list[str]) -> None:
    """Removes folders that were made for a mount that is not there: what is written to them would be in clear. If it
    is there after all, the upper one cannot be removed, and the lower one stays, too."""
    with contextlib.suppress(OSError):
        for path in reversed(made):
            Path(path).rmdir()


def _add_keys(ctx: click.Context, entry: MountEntry) -> None:
    """Puts the auth tokens of the mount's keys into the user keyring, where the kernel looks for them, and unlocks the
    keys: asks for passphrases that the daemon does not have, if there is a terminal."""
    from upcall.cli.key import add
    from upcall.cli.keylock import unlock
    from upcall.cli.keystate import LOCKED, MISSING, NOT_ADDED, ask_daemon, state_of
    from upcall.protocols.ecryptfs.auto_add import add_token

    keyring.ensure_user_keyring_linked()
    store, daemon = KeyStore(), ask_daemon()
    for signature in entry.signatures:
        try:
            key = store.find(signature)
        except UsageError:
            if keyring.find(signature) is not None:
                continue  # made by another program
            raise
        state = state_of(signature, key.source, daemon)
        if state.state == NOT_ADDED and not sys.stdin.isatty() and key.blob is not None:
            add_token(key)
        elif state.state == NOT_ADDED or (state.state in (LOCKED, MISSING) and sys.stdin.isatty()):
            with contextlib.redirect_stdout(sys.stderr):
                ctx.invoke(add if state.state == NOT_ADDED else unlock, name=key.name)
        elif state.state in (LOCKED, MISSING):
            why = f"the key {key.name} is {state}" if state.cause else f"the key {key.name} waits for its passphrase"
            output.note(f"{why}: no file can be opened until `upcall unlock {key.name}`")


def _warn_without_daemon() -> None:
    from upcall.process.control import DaemonControl, NoDaemon

    try:
        with DaemonControl():
            pass
    except (NoDaemon, OSError):
        output.note("no daemon runs: files cannot be opened until `upcall daemon` runs")


@contextlib.contextmanager
def _remedy_of_no_source() -> Iterator[None]:
    """Adds to a NoMountSource what the administrator has to do: allow it, or start the service. ConfigError."""
    try:
        yield
    except NoMountSource as error:
        import pwd

        from upcall.protocols.ecryptfs.mounting.allowed import OFF, START, remedy, rules

        if rules().users:
            raise NoMountSource(f"{error}: start it as root: `{START}`") from None
        try:
            name = pwd.getpwuid(os.getuid()).pw_name
        except KeyError:
            name = str(os.getuid())
        raise NoMountSource(f"{OFF}: {remedy(name)}") from None


# --- umount ------------------------------------------------------------------------------------------------------


@click.command("umount")
@click.argument("names", nargs=-1, metavar="NAME...", shell_complete=completing.mounts)
@click.option("--all", "everything", is_flag=True, help="All of your mounts.")
@click.option("--lazy", is_flag=True, help="Unmount it although it is in use: files that are open stay open.")
@click.option("--on", "event", type=click.Choice(EVENTS), hidden=True)
@_RUNTIME
@click.pass_context
def umount(
    ctx: click.Context, names: tuple[str, ...], everything: bool, lazy: bool, event: str | None, runtime: Path
) -> None:
    """Unmount the folder that was mounted as NAME. Its files stay in LOWER, encrypted.

    \b
    Exit codes: 0 it is not mounted any more, or was not; 64 no such mount; 69 the service that unmounts does not run;
    75 it is in use; 77 it is not yours.

    \b
    Examples:
      $ upcall umount private
    """
    here = mounted(os.getuid())
    if event is not None:
        names = tuple(entry.name for entry in MountStore().all() if event in entry.unmount_on and entry.name in here)
    elif everything:
        names = tuple(here)
    elif not names:
        raise UsageError("which mount? `upcall mounts` lists them; --all: all of them")
    status = 0
    for name in names:
        check_mount_name(name)
        if name not in here:
            if name not in MountStore().names():
                raise UsageError(f"no mount {name!r} is known: `upcall mounts` lists yours")
            output.done(f"{name}: is not mounted")
            continue
        try:
            _unmount(name, Path(here[name]), lazy, event == "logout", runtime)
        except MountRefused as refused:
            click.echo(f"upcall: {for_terminal(str(refused))}", err=True)
            for line in _users_of(here[name]) if refused.status == os.EX_TEMPFAIL else ():
                click.echo(f"upcall: {for_terminal(line)}", err=True)
            status = refused.status
        else:
            output.done(f"{name}: unmounted from {for_terminal(here[name])}")
    ctx.exit(status)


def _unmount(name: str, upper: Path, lazy: bool, insist: bool, runtime: Path) -> None:
    with _remedy_of_no_source():
        try:
            ask_unmount(name, upper, lazy, runtime)
        except MountRefused as refused:
            if not insist or refused.status != os.EX_TEMPFAIL:
                raise
            ask_unmount(name, upper, True, runtime)


def _users_of(point: str) -> list[str]:
    """Returns lines about processes that use a mount, as far as this user may see them. Asks no filesystem: one of
    another process's might not answer."""
    with contextlib.suppress(OSError):
        found = [(pid, how) for pid in _pids() if (how := _use(Path("/proc", str(pid)), point))]
        lines = [f"in use by {_process_name(pid)} (pid {pid}): {how}" for pid, how in found[:_WHO]]
        return [*lines, *([f"and {len(found) - _WHO} more"] if len(found) > _WHO else [])]
    return []


def _pids() -> list[int]:
    found = (folder.name for folder in Path("/proc").iterdir())
    return sorted(int(name) for name in found if name.isdecimal() and int(name) != os.getpid())


def _use(process: Path, point: str) -> str:
    """Returns how a process uses the mount on `point`; "" if not, or if that cannot be seen."""
    for link, how in (("cwd", "works there"), ("root", "has its root there"), ("exe", "is a program from there")):
        if _leads_below(process / link, point):
            return how
    with contextlib.suppress(OSError):
        for descriptor in (process / "fd").iterdir():
            if path := _leads_below(descriptor, point):
                return f"has {path} open"
    return ""


def _leads_below(link: Path, point: str) -> str:
    """Returns the path in a link of /proc, if it is `point` or below it; otherwise ""."""
    with contextlib.suppress(OSError):
        path = os.readlink(link)  # noqa: PTH115 - as text
        return path if f"{path}/".startswith(f"{point}/") else ""
    return ""


def _process_name(pid: int) -> str:
    try:
        return procfs.read(pid, "comm").decode("utf-8", "replace").strip()
    except OSError:
        return "?"


# --- mounts ------------------------------------------------------------------------------------------------------


@click.group("mounts", cls=Group, invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="As JSON, for programs.")
@click.pass_context
def mounts_command(ctx: click.Context, as_json: bool) -> None:
    """List your mounts: those that are remembered, and what is mounted now.

    An administrator allows users to mount by `[mount] users` in /etc/upcall/config.toml, and starts the service that
    does it: `systemctl restart upcall-mount`, after `upcall setup`.

    \b
    Exit codes: 0; 65 what is remembered of a mount is damaged.

    \b
    Examples:
      $ upcall mounts
      $ upcall mounts forget private
    """
    if ctx.invoked_subcommand is not None:
        return
    rows, broken = _rows()
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    elif rows:
        _print(rows)
    elif not broken:
        click.echo("no mounts: `upcall mount NAME LOWER UPPER` makes one")
    if broken:
        ctx.exit(os.EX_DATAERR)


def _rows() -> tuple[list[dict[str, Any]], int]:
    store, here, rows, broken = MountStore(), mounted(os.getuid()), [], 0
    keys = _names_of_keys()
    for name in store.names():
        try:
            entry = store.load(name)
        except (UpcallError, OSError) as error:
            click.echo(f"upcall: {error_text(error)}", err=True)
            broken += 1
            continue
        rows.append({**_plain(entry, keys), "mounted": here.pop(name, None)})
    unknown = MountEntry("", "", "", ())
    rows += [
        {**_plain(unknown, keys), "name": name, "lower": None, "upper": None, "mounted": point}
        for name, point in here.items()
    ]
    return rows, broken


def _plain(entry: MountEntry, keys: dict[str, str]) -> dict[str, Any]:
    row = {key: list(value) if isinstance(value, tuple) else value for key, value in entry._asdict().items()}
    return {**row, "keys": [keys.get(one, one) for one in entry.signatures]}


def _names_of_keys() -> dict[str, str]:
    store, names = KeyStore(), {}
    for name in store.names():
        with contextlib.suppress(PeerError, UsageError, OSError):
            names[store.load(name).signature] = name
    return names


def _print(rows: list[dict[str, Any]]) -> None:
    cells = [
        (
            row["name"],
            "yes" if row["mounted"] else "no",
            row["upper"] or row["mounted"] or "-",
            row["lower"] or "-",
            ", ".join(row["keys"]) or "-",
            "yes" if row["auto"] else "no",
            ", ".join(row["unmount_on"]) or "-",
        )
        for row in rows
    ]
    output.table(_COLUMNS, cells)


@mounts_command.command(short_help="Forget a mount; its folders stay.")
@_NAME
def forget(name: str) -> None:
    """Forget the mount NAME. Its folders and files stay as they are.

    \b
    Exit codes: 0; 64 there is no such mount, or it is mounted now.
    """
    if name in mounted(os.getuid()):
        raise UsageError(f"{name} is mounted: `upcall umount {name}` first")
    MountStore().remove(name)


@mounts_command.command(short_help="Run the process that mounts for users.")
@click.option("--check", is_flag=True, help="Only report whether any user is allowed to mount; if not, exit with 1.")
@click.option(
    "--runtime",
    type=click.Path(file_okay=False, path_type=Path),
    help="The folder for its socket.  [default: /run/upcall]",
)
@click.pass_context
def serve(ctx: click.Context, check: bool, runtime: Path | None) -> None:
    """Run the source that mounts: for the users whom `[mount] users` in the configuration names.

    For root; `upcall setup` makes a service of it (upcall-mount.service), which runs only if there are such users. It
    runs in the foreground until SIGTERM, SIGINT or SIGHUP. It needs no broker, and holds no state.

    \b
    Exit codes: 0 ended as asked; 1 with --check: mounting is off; 69 it could not start; 78 others could change what
    root would run, or the configuration is wrong.

    \b
    Examples:
      # upcall mounts serve
    """
    if check:
        from upcall.protocols.ecryptfs.mounting.allowed import rules

        users = rules().users
        output.done(f"allowed: {', '.join(users)}" if users else "mounting is off: [mount] users names no user")
        ctx.exit(0 if users else 1)
    settings = MountSettings(None if runtime is None else runtime.absolute())
    words = startpython.command("upcall.protocols.ecryptfs.mounting", dumps(settings))
    os.execve(words[0], words, startpython.cleaned())  # noqa: S606

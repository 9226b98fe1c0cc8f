"""Installs upcall's files and enables its services; removes what was installed, and nothing else."""

from __future__ import annotations

import contextlib
import errno
import pwd
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import upcall
from upcall.config import ConfigError
from upcall.core.errors import UpcallError, error_words
from upcall.install import manifest as written
from upcall.install.manifest import FILE, Manifest, digest, is_ours
from upcall.install.wanted import KINDS, PAM, SYSTEMD, File, Order, Orders, ServiceManager, told_as, wanted
from upcall.process import start_python as startpython
from upcall.process import trust
from upcall.process.machine import PEOPLE, USER
from upcall.protocols.request_key import forwarder
from upcall.protocols.request_key.install import lines as requestkey
from upcall.protocols.request_key.install.lines import replace
from upcall.protocols.request_key.install.our_file import FILE as REQUEST_KEY_FILE
from upcall.protocols.request_key.install.system import System

_PATIENCE: Final = 60  # seconds, the time-out of a command
_ELSEWHERE: Final = "install upcall where users can run it: `/usr/bin/python3 -m venv /opt/upcall`, then its pip"


class OrderFailed(UpcallError):
    """A command to the service manager has failed. The text contains the command and its error."""


class SetupPlan(NamedTuple):
    """What to install. `types`: types of keys to be answered through request-key; an existing configuration is kept.
    `manual`: the manual pages, by their path below MAN."""

    kind: ServiceManager
    python: str = sys.executable
    types: tuple[str, ...] = ()
    manual: Mapping[str, str] = {}


def kind_of(root: Path) -> ServiceManager:
    """Returns the service manager of this machine, or of the image below `root`."""
    signs = ["run/systemd/system"] if root == Path("/") else ["lib/systemd/systemd", "usr/lib/systemd/systemd"]
    return SYSTEMD if any((root / sign).exists() for sign in signs) else PAM


def check(system: System, plan: SetupPlan) -> None:
    """Checks everything that could be refused, before anything is changed. ConfigError: root would run code that
    others can change, or that may be missing."""
    image = system.root != Path("/")
    clears = [str(forwarder.SESSION)] if plan.kind is PAM else []
    if clears and not image and not forwarder.SESSION.exists():
        why = "was not compiled, and nothing else keeps what users put into PAM's environment from root"
        raise ConfigError(forwarder.SESSION, f"{why}: apt-get install gcc libc6-dev, and install upcall again")
    if plan.python.startswith(("/home/", "/root/", "/run/", "/tmp/")):  # noqa: S108 - nothing is written there
        raise ConfigError(Path(plan.python), f"services cannot rely on home folders, /run or /tmp: {_ELSEWHERE}")
    for word in (plan.python, str(Path(upcall.__file__)), *clears):
        if len(word.split()) != 1:
            raise ConfigError(Path(word), "a path with spaces is not supported by all programs that read it")
        if why := system.distrust(word, may_miss=image):
            raise ConfigError(Path(word), f"root would run it, but {why}")
        _check_open(system.at(word))
    if not image and plan.python == sys.executable and (faults := trust.faults(deep=True)):
        raise ConfigError(Path(faults[0].path), trust.refusal(faults[0]))
    if (uid := _local_user(system)) is not None and uid >= PEOPLE:
        why = f"{USER!r} is a person's account (uid {uid}): the machine's daemon needs a system user of that name"
        raise ConfigError(system.at("/etc/passwd"), why)
    before = written.read(system.at(FILE))
    if before.kind not in ("", plan.kind.name):
        raise ConfigError(system.at(FILE), f"upcall was set up for {before.kind}: `upcall setup --undo` comes first")
    for path in wanted(plan.kind, plan.python, plan.manual):
        found = _content(system, path)
        if found is not None:
            is_ours(before, path, found)


def _check_open(place: Path) -> None:
    """ConfigError if users cannot reach what their daemons run."""
    for path in (place, place.resolve()):
        closed = [folder for folder in path.parents if folder.exists() and not folder.stat().st_mode & 0o001]
        if path.exists() and closed:
            home = path.is_relative_to("/root") or path.is_relative_to("/home")
            remedy = _ELSEWHERE if home else f"chmod a+x {closed[-1]}"
            raise ConfigError(path, f"users' daemons would run it, but {closed[-1]} is closed to them: {remedy}")


def missing(system: System, plan: SetupPlan) -> list[str]:
    """Returns what has to be done, for people; empty if everything is installed. Errors as `check`."""
    check(system, plan)
    before, files = written.read(system.at(FILE)), wanted(plan.kind, plan.python, plan.manual)
    states = [(path, _state(system, path)) for path, file in files.items() if not _is_there(system, path, file)]
    todo = _summary([*states, *((path, "is no longer used") for path in before.files if path not in files)])
    if system.ours() is None and plan.types:
        todo.append(f"{REQUEST_KEY_FILE}: is not there")
    if not _has_user(system):
        todo.append(f"user {USER}: is not there")
    if not todo and not before.settled:
        todo.append(f"{plan.kind.name}: does not know of it")
    return todo


def install(system: System, plan: SetupPlan) -> list[str]:
    """Installs what is missing; returns what was done, for people. Everything that can be refused is refused first.
    OrderFailed."""
    check(system, plan)
    keys = None
    if system.ours() is None and plan.types:
        keys = requestkey.plan(system, plan.types, forwarder.command(), copy=False)
        requestkey.check_winning(system, keys)
    before, files = written.read(system.at(FILE)), wanted(plan.kind, plan.python, plan.manual)
    state = before._replace(kind=plan.kind.name, folders=(*before.folders, *_new_folders(system, [FILE])))
    todo = [path for path, file in files.items() if not _is_there(system, path, file)]
    new = [path for path in todo if _content(system, path) is None]
    # Recorded first: if this process is killed, no file is left that is not in the record.
    state = state._replace(
        files={**state.files, **{path: digest(files[path].data) for path in new}},
        folders=tuple(dict.fromkeys((*state.folders, *_new_folders(system, new)))),
        settled=state.settled and _has_user(system) and not any(path in plan.kind.files for path in todo),
    )
    if todo:
        _remember(system, state)
    for path in todo:
        if path not in new:
            state = state._replace(files={**state.files, path: digest(files[path].data)})
            _remember(system, state)
        replace(system.at(path), files[path].data, files[path].mode)
    done = _summary([(path, "written") for path in todo])
    if unused := {path: known for path, known in state.files.items() if path not in files}:
        done += _removed(system, unused)
        state = state._replace(files={path: known for path, known in state.files.items() if path in files})
        _remember(system, state)
    if keys is not None:
        state = state._replace(request_key=True)
        _remember(system, state)
        done += requestkey.install(system, keys)
    if not state.settled:
        done += _run(system, _orders(system, plan.kind).on)
        _remember(system, state._replace(settled=True))
    return done


def undo(system: System, packaged: Sequence[Order] = ()) -> list[str]:
    """Removes what `install` made; returns what was done, for people. Files edited since are kept.

    `packaged`: the commands after which the services of an installed package run, which has units of the same names
    and the user."""
    state = written.read(system.at(FILE))
    if not state.kind:
        return []
    kind = KINDS[state.kind]
    orders = _orders(system, kind)
    done = _try(system, orders.off)
    done += _removed(system, state.files)
    if state.request_key:
        try:
            done += requestkey.uninstall(system)
        except FileExistsError as error:
            done.append(f"{error.filename}: left there, for it {error.strerror}")
    done += _try(system, orders.gone)
    done += _try(system, packaged)
    if not packaged and _local_user(system) is not None:
        done.append(f"user {USER}: left there, as packages do: files may belong to it")
    system.at(FILE).unlink()
    for folder in sorted(state.folders, key=len, reverse=True):
        with contextlib.suppress(OSError):  # not empty
            system.at(folder).rmdir()
    return done


def _local_user(system: System) -> int | None:
    """Returns the uid of the system user in the passwd(5) of the image or machine; None if there is none."""
    try:
        lines = system.at("/etc/passwd").read_text("utf-8", "replace").splitlines()
    except OSError:
        return None
    return next((int(line.split(":")[2]) for line in lines if line.startswith(f"{USER}:")), None)


def _has_user(system: System) -> bool:
    """Returns whether the system user exists. In an image, systemd-sysusers may create it at boot."""
    if system.root != Path("/"):
        return True
    try:
        pwd.getpwnam(USER)
    except KeyError:
        return False
    return True


def _orders(system: System, kind: ServiceManager) -> Orders:
    return kind.live if system.root == Path("/") else kind.image


def _run(system: System, orders: Sequence[Order]) -> list[str]:
    done = []
    for order in orders:
        words = [word.replace("{root}", str(system.root)) for word in order]
        try:
            found = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                # Its PATH is also used to find the program.
                env=startpython.fixed(DEBIAN_FRONTEND="noninteractive", HOME="/root"),
                text=True,
                timeout=_PATIENCE,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise OrderFailed(f"{' '.join(words)}: {error_words(error)}") from None
        if found.returncode != 0:
            raise OrderFailed(f"{' '.join(words)}: ended with {found.returncode}: {found.stderr.strip()}")
        done.append(" ".join(words))
    return done


def _try(system: System, orders: Sequence[Order]) -> list[str]:
    """Runs commands like `_run`; a failure is reported and ignored, because its object may have been removed
    already."""
    done = []
    for order in orders:
        try:
            done += _run(system, (order,))
        except OrderFailed as error:
            done.append(str(error))
    return done


def _content(system: System, path: str) -> bytes | None:
    """Returns a file's content; None if it does not exist. FileExistsError if it is a symbolic link."""
    place = system.at(path)
    if place.is_symlink():
        raise FileExistsError(errno.EEXIST, "is a symbolic link, and was not made by upcall: move it away", path)
    try:
        return place.read_bytes()
    except FileNotFoundError:
        return None


def _is_there(system: System, path: str, file: File) -> bool:
    return _content(system, path) == file.data and system.at(path).stat().st_mode & 0o777 == file.mode


def _state(system: System, path: str) -> str:
    return "is not there" if _content(system, path) is None else "says something else"


def _removed(system: System, known: Mapping[str, str]) -> list[str]:
    """Removes files, given their SHA-256; those edited since are kept. Returns what was done."""
    results = []
    for path, known_digest in known.items():
        data = _content(system, path)
        if data is not None and digest(data) != known_digest:
            results.append((path, "left there, for it is not as upcall made it"))
        elif data is not None:
            system.at(path).unlink()
            results.append((path, "removed"))
    return _summary(results)


def _summary(said: Sequence[tuple[str, str]]) -> list[str]:
    """Returns a line per (path, what was done); pages of a folder with the same result share one."""
    lines: dict[tuple[str, str], list[str]] = {}
    for path, what in said:
        lines.setdefault((told_as(path), what), []).append(path)
    return [
        f"{folder}: {what}" if paths == [folder] else f"{folder}: {what}: {_pages(paths)}"
        for (folder, what), paths in lines.items()
    ]


def _pages(paths: Sequence[str]) -> str:
    return Path(paths[0]).name if len(paths) == 1 else f"{len(paths)} pages"


def _new_folders(system: System, paths: Iterable[str]) -> list[str]:
    above = [folder for path in paths for folder in reversed(Path(path).parents)]
    return [str(folder) for folder in dict.fromkeys(above) if not system.at(str(folder)).exists()]


def _remember(system: System, state: Manifest) -> None:
    replace(system.at(FILE), written.shown(state), 0o644)

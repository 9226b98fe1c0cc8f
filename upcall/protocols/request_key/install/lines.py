"""Installs upcall's lines into request-key's configuration and removes them. Never changes a file that upcall did not
write."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from upcall.config import ConfigError
from upcall.protocols.request_key.conf import Line, choose, command_fault, narrower, wildness_of
from upcall.protocols.request_key.install.our_file import COPY, FILE, Ours, is_upcalls, render
from upcall.protocols.request_key.install.system import System
from upcall.protocols.request_key.key_types import KEY_TYPES

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Plan(NamedTuple):
    """The intended content of our file. `program`: the content of the copy of the program; None: no copy."""

    ours: Ours
    program: bytes | None


def plan(system: System, types: Sequence[str], command: Sequence[str], copy: bool) -> Plan:
    """Returns the plan for an installation. Changes nothing.

    `types`: key types. `command`: the words that run upcall-request-key, whose path is the last. `copy`: install a
    copy of it that only root can change. ConfigError if root cannot run the command safely. OSError if the program
    cannot be read.
    """
    program = None
    if copy:
        program = Path(command[-1]).read_bytes()
        command = [*command[:-1], COPY]
    for word in command:
        if word.split() != [word]:
            raise ConfigError(Path(word), "request-key cannot be given a path with a space; --copy has none")
        if word.startswith("/") and (why := system.distrust(word, may_miss=copy and word == COPY)):
            advice = "" if word == COPY else "; --copy makes a copy that only root can change"
            raise ConfigError(Path(word), f"root would run it, but {why}{advice}")
    copied = None if program is None else hashlib.sha256(program).hexdigest()
    ordered = tuple(name for name in KEY_TYPES if name in types)
    found = Plan(Ours(ordered, tuple(command), copied), program)
    if why := command_fault(" ".join(command).encode()):
        raise ConfigError(Path(command[0]), why)
    return found


def check_winning(system: System, planned: Plan) -> None:
    """ConfigError if another line would take precedence over ours; BadLine if request-key would fail on a line."""
    read = system.lines_if(render(planned.ours))
    for name in planned.ours.types:
        for key in KEY_TYPES[name].typical:
            line = choose(read, key)
            if line is not None and not is_upcalls(line.path):
                why = f"line {line.number} wins over ours for {name}: narrow its description, or remove it"
                raise ConfigError(Path(line.path), f"{why}; nothing was changed")


def others(system: System, types: Sequence[str]) -> list[tuple[str, Line, bool]]:
    """Returns the lines of other files for these types, as (type, line, whether keys that match it still go to it)."""
    found = []
    for line in system.lines():
        for name in () if is_upcalls(line.path) else types:
            if len(line.columns) > 1 and wildness_of(line.columns[1], name.encode("ascii")) == 0:
                patterns = KEY_TYPES[name].patterns
                found.append((name, line, any(narrower(line, name.encode("ascii"), one) for one in patterns)))
    return found


def missing(system: System, planned: Plan) -> list[str]:
    """Returns the differences between the plan and the system, for people; [] if there are none. FileExistsError if
    FILE was not written by upcall, or was edited."""
    current = system.ours()
    todo = []
    if planned.program is not None and (found := _content(system.at(COPY))) != planned.program:
        todo.append(f"{COPY}: {'is not there' if found is None else 'is not a copy of the program'}")
    if current is None:
        todo.append(f"{FILE}: is not there")
    elif current != planned.ours:
        todo.append(f"{FILE}: says something else")
    elif system.at(FILE).stat().st_mode & 0o777 != 0o644:
        todo.append(f"{FILE}: its mode is not 0644")
    return todo


def install(system: System, planned: Plan) -> list[str]:
    """Carries out a plan. Returns what was done, for people. Makes all checks before the first change.

    ConfigError, BadLine, FileExistsError as above; OSError if a file cannot be written.
    """
    before = system.ours()
    check_winning(system, planned)
    todo, done = missing(system, planned), []
    if any(one.startswith(COPY) for one in todo) and planned.program is not None:
        _check_copy_is_ours(system, before)
        replace(system.at(COPY), planned.program, 0o755)
        done.append(f"{COPY}: written")
    if any(one.startswith(FILE) for one in todo):
        replace(system.at(FILE), render(planned.ours), 0o644)
        done.append(f"{FILE}: written")
    if before is not None and planned.program is None:
        done += _remove_copy(system, before)
    return done


def uninstall(system: System) -> list[str]:
    """Removes what `install` wrote. Returns what was done, for people. FileExistsError as `missing`."""
    ours = system.ours()
    if ours is None:
        return []
    system.at(FILE).unlink()
    return [f"{FILE}: removed", *_remove_copy(system, ours)]


def _check_copy_is_ours(system: System, before: Ours | None) -> None:
    found = _content(system.at(COPY))
    if found is not None and hashlib.sha256(found).hexdigest() != (before.copied if before else None):
        raise FileExistsError(errno.EEXIST, "is there, and not as upcall made it: move it away", COPY)


def _remove_copy(system: System, ours: Ours) -> list[str]:
    path = system.at(COPY)
    content = None if ours.copied is None else _content(path)
    if content is None:
        return []
    if hashlib.sha256(content).hexdigest() != ours.copied:
        return [f"{COPY}: left there, for it is not as upcall made it"]
    path.unlink()
    with contextlib.suppress(OSError):  # ENOTEMPTY: the folder holds other files
        path.parent.rmdir()
    return [f"{COPY}: removed"]


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def replace(path: Path, data: bytes, mode: int) -> None:
    """Replaces a file atomically and durably (fsync). Creates its folders with mode 0755. `mode`: of the file,
    whatever the umask. OSError; the file is then unchanged."""
    for folder in reversed(path.parents):
        if not folder.exists():
            folder.mkdir()
            folder.chmod(0o755)
    beside = path.with_name(f".{path.name}.{os.urandom(6).hex()}")  # request-key ignores names that begin with a dot
    try:
        fd = os.open(beside, _NEW, mode)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from None
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, mode)  # whatever the umask is
            file.write(data)
            file.flush()
            os.fsync(fd)
        beside.replace(path)
    except BaseException:
        beside.unlink()
        raise
    folder_fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder_fd)
    finally:
        os.close(folder_fd)

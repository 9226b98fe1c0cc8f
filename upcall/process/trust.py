"""Checks by path that only root (or, for a user's own processes, that user) can change the code that is run.

It examines names, owners and modes of a file, of every folder above it and of every symbolic link on the way; it
imports and runs nothing. An access control list that lets others write shows as writable by the group. A sticky folder
in which everyone may create files but not replace others' (as /tmp) is accepted above an existing file, and never as a
place where something is searched.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from upcall.process.log import EventLog

_MAX_LINKS: Final = 40  # the kernel's limit
_OTHERS_WRITE: Final = 0o022
_CODE: Final = (".py", ".pyc", ".so", ".pth")
_PLAIN: Final = 0o170000 | _OTHERS_WRITE  # bits of a mode: the type of file, and whether others may write
# Below the standard library lie the packages of the interpreter that a virtual environment was made from: tens of
# thousands of files that are not used. Where they are used, they are an entry of sys.path of their own.
_NOT_IMPORTED: Final = ("site-packages", "dist-packages")
_MOST: Final = 20  # faults reported


class Fault(NamedTuple):
    """`path`: what others could change; `why`: the reason; `command`: a shell command that fixes it, or ""."""

    path: str
    why: str
    command: str

    def __str__(self) -> str:
        return f"{self.path} {self.why}"


def log_faults(faults: Iterable[Fault], log: EventLog) -> None:
    """Logs the faults that are no reason to refuse: those of `require`."""
    for fault in faults:
        log("file-not-trusted", file=fault.path, why=fault.why)


def distrust(path: str, root: Path = Path("/"), owners: Collection[int] = (0,), may_miss: bool = False) -> str:
    """Returns why users other than `owners` could change the file at this absolute path below `root`, or "".

    `may_miss`: a missing file is no fault.
    """
    try:
        found = Trust(owners, root).walk(path)
        if isinstance(found, Fault):
            return str(found)
        return "" if stat.S_ISREG(found.st_mode) else f"{_shown(str(_under(root, path)), root)} is not a regular file"
    except FileNotFoundError as error:
        return "" if may_miss else f"{_shown(str(error.filename), root)} is not there"
    except OSError as error:
        return f"{_shown(str(error.filename), root)}: {error.strerror}"


class Trust:
    """Checks paths, each folder once. Not thread-safe."""

    def __init__(self, owners: Collection[int], root: Path = Path("/")) -> None:
        self._owners, self._root = frozenset(owners), root
        self._good: set[str] = set()  # folders accepted above a file
        self.seen: set[str] = set()  # files accepted in their folder

    def walk(self, path: str) -> Fault | os.stat_result:
        """Returns the stat of a file or folder if it and everything above it belong to the owners; otherwise the first
        fault. OSError."""
        root = str(self._root)
        here, left, links = root, _parts(path), 0
        while True:
            if left and here in self._good:
                here = self._next(here, left)
                continue
            found = os.lstat(here)
            if fault := self.look(here, found, last=not left):
                return fault
            if stat.S_ISLNK(found.st_mode):
                links += 1
                if links > _MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), here)
                target = os.readlink(here)  # noqa: PTH115
                here, left = root if target.startswith("/") else _above(here), left + _parts(target)
                continue
            if not left:
                return found
            if not stat.S_ISDIR(found.st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), here)
            self._good.add(here)
            here = self._next(here, left)

    def _next(self, here: str, left: list[str]) -> str:
        """Returns the next path on the way. `here` contains no links, so its parent is what ".." means; above the root
        is the root."""
        part = left.pop()
        if part == "..":
            return here if here == str(self._root) else _above(here)
        return f"{here.rstrip('/')}/{part}"

    def look(self, path: str, found: os.stat_result, last: bool) -> Fault | None:
        """Checks one file, link or folder. `last`: it is the file in question, not a folder above it."""
        shown = _shown(path, self._root)
        if found.st_uid not in self._owners:
            return Fault(shown, f"belongs to uid {found.st_uid}", f"chown {min(self._owners)} {quote(path)}")
        if stat.S_ISLNK(found.st_mode) or not found.st_mode & _OTHERS_WRITE:
            return None
        if not last and found.st_mode & stat.S_ISVTX:
            return None
        mode = stat.S_IMODE(found.st_mode)
        return Fault(shown, f"has mode {mode:04o}: others can write to it", f"chmod go-w {quote(path)}")

    def place(self, path: str) -> Iterator[Fault]:
        """Checks a folder (or archive) where modules are searched; if it does not exist, the folder where it could be
        created."""
        try:
            found = self.walk(path)
        except FileNotFoundError:
            if _above(path) != path:
                yield from self.place(_above(path))
        except OSError as error:
            yield Fault(path, f"cannot be looked at: {error.strerror}", "")
        else:
            if isinstance(found, Fault):
                yield found

    def inside(self, folder: str, deep: bool) -> Iterator[Fault]:
        """Checks the entries of a trusted folder; `deep`: and everything below it."""
        try:
            entries = list(os.scandir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            yield Fault(folder, f"cannot be looked at: {error.strerror}", "")
            return
        for entry in entries:
            try:
                found = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if found.st_mode & _PLAIN == stat.S_IFREG and found.st_uid in self._owners:
                self.seen.add(entry.path)
                continue
            if fault := self.look(entry.path, found, last=True):
                yield fault
            elif stat.S_ISLNK(found.st_mode):
                if entry.is_dir() or entry.name.endswith(_CODE):
                    yield from self.place(entry.path)
            elif deep and stat.S_ISDIR(found.st_mode) and entry.name not in _NOT_IMPORTED:
                yield from self.inside(entry.path, deep)

    def tree(self, path: str) -> Iterator[Fault]:
        """Checks a package's folder with everything in it, or a module's file."""
        faults = list(self.place(path))
        yield from faults or self.inside(path, deep=True)


def owners() -> frozenset[int]:
    """Returns the uids whose files this process may run: root's and its own user's."""
    return frozenset({0, os.geteuid()})


def faults(deep: bool = False, more: Iterable[str] = ()) -> list[Fault]:
    """Returns what others could change of what this interpreter runs: the interpreter, pyvenv.cfg, every entry of
    sys.path and the files in it, what .pth files add to it, upcall's own files, and the files in `more`. Up to _MOST
    faults.

    `deep`: everything below sys.path, which takes long if that is large; otherwise only loaded files of other
    libraries.
    """
    trust = Trust(owners())
    found: dict[Fault, None] = {}
    programs = [sys.executable, str(Path(sys.prefix, "pyvenv.cfg")), *more]
    for path in filter(None, programs):
        found |= dict.fromkeys(trust.place(path))
    for entry in dict.fromkeys(path for path in sys.path if not path.startswith("__editable__")):
        if not entry.startswith("/"):
            found[Fault(repr(entry), "is in sys.path, and is not a whole path", "")] = None
            continue
        if at := list(trust.place(entry)):
            found |= dict.fromkeys(at)
            continue
        found |= dict.fromkeys(trust.inside(entry, deep))
        for target in _added_in(entry):
            found |= dict.fromkeys(trust.tree(target))
    found |= dict.fromkeys(trust.tree(str(Path(__file__).parent)))
    loaded = {getattr(module, "__file__", None) for module in tuple(sys.modules.values())}
    for path in sorted(file for file in loaded if isinstance(file, str) and file.startswith("/")):
        if path not in trust.seen:
            found |= dict.fromkeys(trust.place(path))
    return list(found)[:_MOST]


def require() -> list[Fault]:
    """Returns the faults. As root raises ConfigError instead, unless the system's configuration has `[trust] check =
    false`. For other users a fault is worth a warning only: it concerns their own processes."""
    found = faults()
    if found and os.geteuid() == 0 and _is_wanted():
        from upcall.config import ConfigError

        raise ConfigError(Path(found[0].path), refusal(found[0]))
    return found


def refusal(fault: Fault) -> str:
    """Describes a file that root must not run, and what to do."""
    mends = f": {fault.command}" if fault.command else ""
    if "belongs to" in fault.why:
        mends += ", or install upcall where only root can write: python3 -m venv /opt/upcall"
    hint = "`upcall doctor` shows all there is; [trust] check = false in /etc/upcall/config.toml allows it"
    return f"root would run it, but it {fault.why}{mends}; {hint}"


def _is_wanted() -> bool:
    """Returns whether the check is on. Only files that root alone can write configure it."""
    from upcall import config

    return bool(config.settings("trust").get("check", True))


def of_package(name: str) -> list[Fault]:
    """Returns what others could change of the package or module of this name, without importing it; its own entry of
    sys.path is checked, too. Nothing if there is no such package."""
    from importlib.util import find_spec

    try:
        spec = find_spec(name.partition(".")[0])
    except (ImportError, ValueError):
        return []
    if spec is None:
        return []
    trust = Trust(owners())
    places = list(spec.submodule_search_locations or ())
    if spec.origin is not None and spec.origin.startswith("/") and not places:
        places = [spec.origin]
    found = [fault for place in places for fault in trust.tree(place)][:_MOST]
    return [] if found and os.geteuid() == 0 and not _is_wanted() else found


def _added_in(folder: str) -> Iterator[str]:
    """Yields what the .pth files in a folder add to sys.path, and the folders of editable installations.

    Code lines are not run; the file that contains them, and the modules beside it, are checked as all others are.
    Source: site.py, and setuptools' editable_wheel.py, which writes `MAPPING: dict[str, str] = {...}`.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except OSError:
        return
    for name in names:
        if name.endswith(".pth"):
            for line in _lines(Path(folder, name)):
                if line and not line.startswith(("#", "import ", "import\t")):
                    yield os.path.join(folder, line)  # noqa: PTH118 - as site does: an absolute line stays as it is
        elif name.startswith("__editable__") and name.endswith("_finder.py"):
            for line in _lines(Path(folder, name)):
                if line.startswith("MAPPING"):
                    yield from _strings(line)


def _strings(line: str) -> list[str]:
    """Returns the paths in `MAPPING: dict[str, str] = {'name': '/path'}`. Parsing it by ast would take longer than the
    check."""
    return [word for word in line.split(line[-2]) if word.startswith("/")] if len(line) > 2 else []


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text("utf-8", "replace").splitlines()]
    except OSError:
        return []


def _parts(path: str) -> list[str]:
    """Returns the components of a path, last first."""
    return [part for part in reversed(path.split("/")) if part not in ("", ".")]


def _above(path: str) -> str:
    return path.rstrip("/").rpartition("/")[0] or "/"


def _under(root: Path, path: str) -> Path:
    return root / path.lstrip("/")


def _shown(path: str, root: Path) -> str:
    """Returns the path as seen below `root`."""
    return path if root == Path("/") else "/" + path.removeprefix(str(root)).lstrip("/")

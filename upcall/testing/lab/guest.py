"""Makes the guest's configuration files for the initramfs."""

from __future__ import annotations

import os
import shlex
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from upcall.process import trust

RESULTS = "/results"
# These folders start empty in the guest (furnish.sh mounts them).
EMPTY_IN_GUEST = (Path("/tmp"), Path("/home"), Path("/run"), Path("/dev/shm"))  # noqa: S108
EVERYBODY_ENTERS = stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Session:
    """One command for the guest. `mark`: ends each of its streams; one word, unique for each run. `terminal`: (rows,
    columns) for an interactive command. `kernel`: "qemu" or "uml". `init`: path of a systemd to run as process 1."""

    argv: Sequence[str]
    cwd: Path
    mark: str
    release: str
    modules: Path
    env: Mapping[str, str] = field(default_factory=dict)
    terminal: tuple[int, int] | None = None
    kernel: str = "qemu"
    init: Path | None = None


def files(session: Session) -> dict[str, bytes]:
    """Returns the initramfs's files by name. Arguments that are not UTF-8 keep their bytes."""
    scripts = resources.files(__package__)
    return {
        "init": (scripts / "init.sh").read_bytes(),
        "lab/kernel.sh": (scripts / f"{session.kernel}.sh").read_bytes(),
        "lab/furnish.sh": (scripts / "furnish.sh").read_bytes(),
        "lab/session.sh": (scripts / "session.sh").read_bytes(),
        "lab/settings": os.fsencode(_settings(session)),
        "lab/paths": os.fsencode(_paths(session.cwd)),
        "lab/command": os.fsencode(command_script(session)),
    }


def command_script(session: Session) -> str:
    """Returns a shell script that executes the command. The host's /bin/sh does that: busybox's would prefer its own
    `ls` to the host's. Exit codes 126 and 127 are as in any shell."""
    environment = [shlex.quote(f"{name}={value}") for name, value in environment_for(session).items()]
    argv = [shlex.quote(argument) for argument in session.argv]
    return "\n".join(
        [
            f"cd {shlex.quote(str(session.cwd))} || exit {os.EX_NOINPUT}",
            " ".join(["exec env -i", *environment, "/bin/sh -c 'exec \"$@\"' sh", *argv]),
            "",
        ]
    )


def environment_for(session: Session) -> dict[str, str]:
    """Returns the command's environment. Nothing is inherited from the host."""
    environment = {
        "HOME": "/home/root",
        "LANG": "C.UTF-8",
        "LOGNAME": "root",
        "PATH": f"{sys.prefix}/bin:/run/lab/bin:{SYSTEM_PATH}:/run/lab/fallback",
        "SHELL": "/bin/sh",
        "UPCALL_LAB": "1",
        "UPCALL_LAB_RESULTS": RESULTS,
        "USER": "root",
    }
    if sys.prefix != sys.base_prefix:
        environment["VIRTUAL_ENV"] = sys.prefix
    return environment | dict(session.env)


def python_folders() -> list[Path]:
    """Returns the folders of this Python and its modules, by all their names (symbolic links included)."""
    package = Path(__file__).parent.parent.parent
    executable = Path(sys.executable)
    prefixes = [Path(prefix) for prefix in (sys.prefix, sys.base_prefix, sys.exec_prefix, *sys.path)]
    named = [package, executable.parent, executable.resolve().parent, *prefixes]
    real = [folder.resolve() for folder in named]
    return [folder for folder in (*named, *real) if folder.is_absolute() and folder.is_dir()]


def hidden(paths: Sequence[Path]) -> list[Path]:
    """Returns the paths in folders that are empty in the guest at first, outer ones first."""
    return sorted({path for path in paths if any(empty in path.parents for empty in EMPTY_IN_GUEST)})


def closed(paths: Sequence[Path]) -> list[Path]:
    """Returns those of the paths and their parent folders that not all users may enter."""
    folders = {folder for path in paths for folder in (path, *path.parents)}
    return sorted(folder for folder in folders if ~folder.stat().st_mode & EVERYBODY_ENTERS)


def _settings(session: Session) -> str:
    rows, columns = session.terminal or (0, 0)
    settings = {
        "RELEASE": session.release,
        "MODULES": str(session.modules),
        "MARK": session.mark,
        # Files have the same owners as on the host; the guest's root runs them.
        "TRUSTED": "" if os.geteuid() != 0 or trust.faults() else "yes",
        "INIT": str(session.init or ""),
        "INTERACTIVE": "yes" if session.terminal else "",
        "ROWS": str(rows),
        "COLUMNS": str(columns),
    }
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in settings.items())


def _paths(cwd: Path) -> str:
    paths = [*python_folders(), cwd]
    lines = [f"keep {shlex.quote(str(path))}" for path in hidden(paths)]
    lines += [f"traversable {shlex.quote(str(folder))}" for folder in closed(paths)]
    return "\n".join([*lines, ""])

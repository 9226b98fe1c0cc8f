"""Makes the guest's configuration files in the initramfs."""

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
    """One command for the guest. `mark` ends each of its streams; it is new for every run and one word.
    `terminal` is (rows, columns) for a command that talks to a person; `kernel` names the lab's kernel; `init` is a
    systemd that is to be process 1."""

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
    """The initramfs's files by name. Text that is no UTF-8 passes as the bytes it was on the command line."""
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
    """A shell script that becomes the command. The host's /bin/sh does the last step: busybox's would take
    its own `ls` before the host's. 127 and 126 mean what they mean in any shell."""
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
    """All that the command finds in its environment: nothing of the host's passes by itself."""
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
    """Where this Python and what it imports live, by every name they go by."""
    package = Path(__file__).parent.parent.parent
    executable = Path(sys.executable)
    prefixes = [Path(prefix) for prefix in (sys.prefix, sys.base_prefix, sys.exec_prefix, *sys.path)]
    named = [package, executable.parent, executable.resolve().parent, *prefixes]
    real = [folder.resolve() for folder in named]
    return [folder for folder in (*named, *real) if folder.is_absolute() and folder.is_dir()]


def hidden(paths: Sequence[Path]) -> list[Path]:
    """Those that lie in folders which start empty in the guest, the outer before the inner."""
    return sorted({path for path in paths if any(empty in path.parents for empty in EMPTY_IN_GUEST)})


def closed(paths: Sequence[Path]) -> list[Path]:
    """Of the paths and the folders above them those that not everybody may enter."""
    folders = {folder for path in paths for folder in (path, *path.parents)}
    return sorted(folder for folder in folders if ~folder.stat().st_mode & EVERYBODY_ENTERS)


def _settings(session: Session) -> str:
    rows, columns = session.terminal or (0, 0)
    settings = {
        "RELEASE": session.release,
        "MODULES": str(session.modules),
        "MARK": session.mark,
        # Whose files these are is as on the host; in the guest root runs them.
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

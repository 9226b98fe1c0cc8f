"""Starts a user's daemon as root, at a login."""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from upcall.process import start_python as startpython

COMMAND: Final[tuple[str, ...]] = tuple(startpython.command("upcall", "daemon", isolated=True))
_LOG: Final = "/dev/log"
_PATH: Final = "/usr/local/bin:/usr/bin:/bin"


def start(user: pwd.struct_passwd, command: Sequence[str] = COMMAND) -> int:
    """Starts the daemon; returns its pid. It has the user's ids, groups and folders and a session of its own, and
    inherits nothing from the login. OSError."""
    folder = Path(f"/run/user/{user.pw_uid}")
    if not folder.exists():  # without logind nothing else creates it
        folder.parent.mkdir(mode=0o755, exist_ok=True)
        folder.mkdir(mode=0o700)
        os.chown(folder, user.pw_uid, user.pw_gid, follow_symlinks=False)
    log = to_syslog()
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL if log is None else log.fileno(),
            cwd="/",
            env=environment(user, folder),
            user=user.pw_uid,
            group=user.pw_gid,
            extra_groups=os.getgrouplist(user.pw_name, user.pw_gid),
            umask=0o077,
            start_new_session=True,
        ).pid
    finally:
        if log is not None:
            log.close()


def environment(user: pwd.struct_passwd, folder: Path) -> dict[str, str]:
    """Returns the daemon's environment. PAM's is not used, because users can influence it."""
    return {
        "HOME": user.pw_dir,
        "USER": user.pw_name,
        "LOGNAME": user.pw_name,
        "SHELL": user.pw_shell or "/bin/sh",
        "PATH": _PATH,
        "LANG": "C.UTF-8",
        "XDG_RUNTIME_DIR": str(folder),
    }


def to_syslog() -> socket.socket | None:
    """Returns a non-blocking datagram socket to syslog; None if there is none. Syslog expects lines that begin with
    `name[pid]: `, as our processes write them to stderr."""
    log = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        log.connect(_LOG)
    except OSError:
        log.close()
        return None
    return log


def tell(text: str) -> None:
    """Writes one line to syslog (authpriv, err), if it is available."""
    log = to_syslog()
    if log is not None:
        with log, contextlib.suppress(OSError):
            log.send(f"<83>upcall-session[{os.getpid()}]: {text}".encode("utf-8", "backslashreplace"))

"""Lists the files and service manager commands that an installation needs."""

from __future__ import annotations

import string
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Final, NamedTuple

from upcall.process.machine import USER
from upcall.protocols.request_key.forwarder import SESSION

Order = tuple[str, ...]  # a command; {root} in a word stands for the image's folder


class Orders(NamedTuple):
    """Commands to run after the files were written, before they are removed, and after that."""

    on: tuple[Order, ...] = ()
    off: tuple[Order, ...] = ()
    gone: tuple[Order, ...] = ()


class File(NamedTuple):
    """A file to write."""

    data: bytes
    mode: int = 0o644


class ServiceManager(NamedTuple):
    """A way to start daemons at logins. `live`: commands on a running machine; `image`: for an image of one."""

    name: str
    files: Mapping[str, tuple[str, int]]  # path -> (template, mode)
    live: Orders
    image: Orders


# Root's daemon is enabled, too; its unit starts it only if root has keys.
_SYSTEM: Final = (
    "upcall-broker.service", "upcall-quota.service", "upcall-system-daemon.service", "upcall-root-daemon.service",
    "upcall-keytab.path", "upcall-mount.service",
)  # fmt: skip
_STARTED: Final = ("upcall-keytab.service",)  # started by another unit
_USER: Final = "upcall-daemon.service"

SYSTEMD: Final = ServiceManager(
    "systemd",
    {
        **{f"/etc/systemd/system/{unit}": (f"{unit}.in", 0o644) for unit in (*_SYSTEM, *_STARTED)},
        f"/etc/systemd/user/{_USER}": (f"{_USER}.in", 0o644),
        "/etc/tmpfiles.d/upcall.conf": ("upcall.tmpfiles.in", 0o644),
        "/etc/sysusers.d/upcall.conf": ("upcall.sysusers.in", 0o644),
    },
    Orders(
        on=(
            ("systemd-sysusers", "upcall.conf"),
            ("systemctl", "daemon-reload"),
            ("systemctl", "--quiet", "enable", *_SYSTEM),
            ("systemctl", "--quiet", "--global", "enable", _USER),
            ("systemctl", "restart", *_SYSTEM),
        ),
        off=(
            ("systemctl", "--quiet", "--global", "disable", _USER),
            ("systemctl", "--quiet", "disable", "--now", *reversed(_SYSTEM)),
        ),
        gone=(("systemctl", "daemon-reload"),),
    ),
    Orders(
        on=(
            ("systemd-sysusers", "--root={root}", "upcall.conf"),
            ("systemctl", "--root={root}", "--quiet", "enable", *_SYSTEM),
            ("systemctl", "--root={root}", "--quiet", "--global", "enable", _USER),
        ),
        off=(
            ("systemctl", "--root={root}", "--quiet", "--global", "disable", _USER),
            ("systemctl", "--root={root}", "--quiet", "disable", *_SYSTEM),
        ),
    ),
)

PAM: Final = ServiceManager(
    "pam",
    {
        "/usr/share/pam-configs/upcall": ("upcall.pam.in", 0o644),
        "/etc/init.d/upcall": ("upcall.init.in", 0o755),
    },
    Orders(
        on=(
            ("adduser", "--quiet", "--system", "--group", "--home", "/nonexistent", "--no-create-home", USER),
            ("adduser", "--quiet", USER, "tty"),
            ("update-rc.d", "upcall", "defaults"),
            ("/etc/init.d/upcall", "restart"),
            ("pam-auth-update", "--package"),
        ),
        off=(("pam-auth-update", "--package", "--remove", "upcall"), ("/etc/init.d/upcall", "stop")),
        gone=(("update-rc.d", "upcall", "remove"),),
    ),
    Orders(),  # these programs, like debconf, work only on the machine on which they run
)

KINDS: Final = {kind.name: kind for kind in (SYSTEMD, PAM)}


# The folder that man(1) searches for pages that are not from the distribution's packages.
MAN: Final = "/usr/local/share/man"


def wanted(kind: ServiceManager, python: str, manual: Mapping[str, str]) -> dict[str, File]:
    """Returns all files to install by path: units or scripts, completions, manual pages. `manual`: the pages, by their
    path below MAN."""
    from upcall.install.completion import FILES, script  # imports click

    started = {path: File(content(kind, path, python), mode) for path, (_, mode) in kind.files.items()}
    scripts = {path: File(script(shell).encode()) for shell, path in FILES.items()}
    return started | scripts | {f"{MAN}/{name}": File(text.encode()) for name, text in manual.items()}


def told_as(path: str) -> str:
    """Returns the name under which a path is reported: the file, or the folder of a manual page."""
    return str(Path(path).parent) if path.startswith(f"{MAN}/") else path


def content(kind: ServiceManager, path: str, python: str, session: str = str(SESSION)) -> bytes:
    """Returns the content of a unit or script. `python`: the interpreter that has upcall; `session`: the program that
    clears PAM's environment."""
    template = files("upcall.install").joinpath("units", kind.files[path][0]).read_text("utf-8")
    return string.Template(template).substitute(python=python, session=session).encode()

"""As which user the machine's daemon runs: the one that parses what KDCs, name servers and mail servers send.

`upcall setup` makes the system user `upcall` for it. Where there is no such user, root's daemon is the machine's.
"""

from __future__ import annotations

import functools
import os
import pwd
from pathlib import Path
from typing import Final

from upcall import config

USER: Final = "upcall"
ROOT: Final = 0
UNIT: Final = "upcall-system-daemon.service"
FOLDER: Final = Path("/run/upcall/process/machine")  # the daemon's own
_CREDENTIALS: Final = (f"run/credentials/{UNIT}", "run/upcall/credentials")  # systemd's, the init script's
KEYTAB: Final = "krb5.keytab"
PEOPLE: Final = 1000  # the first uid of people's accounts (UID_MIN of login.defs)


def read() -> int:
    """The uid of the machine's daemon, as the configuration and passwd(5) say now. ConfigError. May wait for a
    directory of names.

    Unless the configuration names it, an account of that name which is a person's does not count: the machine's
    keytab and everybody's quota warnings would go to that person."""
    name = config.settings("daemon").get("machine-user")
    try:
        uid = pwd.getpwnam(name or USER).pw_uid
    except KeyError:
        if name is None:
            return ROOT
        raise config.blame(("daemon", "machine-user"), f"there is no user {name!r}") from None
    return uid if name is not None or uid < PEOPLE else ROOT


@functools.cache
def uid() -> int:
    """The same, as it was when this process first asked."""
    return read()


def is_ours() -> bool:
    """Whether this process is the machine's daemon, or acts as it."""
    return os.geteuid() == uid()


def credentials(root: Path = Path("/")) -> Path | None:
    """The folder with what root's files hold and the machine's daemon needs: made by the service manager (systemd's
    LoadCredential=) or the init script. None if neither has started it."""
    return next((root / folder for folder in _CREDENTIALS if (root / folder).is_dir()), None)


def handed_over() -> dict[str, str]:
    """The environment in which a process of that user finds the same as the daemon does."""
    folder = credentials()
    told = {"XDG_RUNTIME_DIR": str(FOLDER)}
    if folder is not None:
        told |= {"CREDENTIALS_DIRECTORY": str(folder), "KRB5_KTNAME": f"FILE:{folder / KEYTAB}"}
    return told

"""Determines the user of the machine's daemon, which parses data from KDCs, name servers and mail servers.

`upcall setup` creates the system user `upcall` for it. Without such a user, root's daemon is the machine's.
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
FOLDER: Final = Path("/run/upcall/machine")  # the daemon's own
_CREDENTIALS: Final = (f"run/credentials/{UNIT}", "run/upcall/credentials")  # systemd's, the init script's
KEYTAB: Final = "krb5.keytab"
PEOPLE: Final = 1000  # the first uid of people's accounts (UID_MIN of login.defs)


def read() -> int:
    """Returns the uid of the machine's daemon, from the configuration and passwd(5). ConfigError. May block on a name
    service.

    Unless the configuration names the user, a person's account of that name is ignored: otherwise that person would
    receive the machine's keytab and all quota warnings."""
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
    """Returns the same, cached since the first call of this process."""
    return read()


def is_ours() -> bool:
    """Returns whether this process runs as the user of the machine's daemon."""
    return os.geteuid() == uid()


def credentials(root: Path = Path("/")) -> Path | None:
    """Returns the folder with copies of root's files that the machine's daemon needs, made by systemd
    (LoadCredential=) or the init script. None if neither has started the daemon."""
    return next((root / folder for folder in _CREDENTIALS if (root / folder).is_dir()), None)


def handed_over() -> dict[str, str]:
    """Returns the environment variables with which a process of that user finds the same files as the daemon."""
    folder = credentials()
    variables = {"XDG_RUNTIME_DIR": str(FOLDER)}
    if folder is not None:
        variables |= {"CREDENTIALS_DIRECTORY": str(folder), "KRB5_KTNAME": f"FILE:{folder / KEYTAB}"}
    return variables

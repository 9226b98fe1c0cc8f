"""Reads the table [mount] of the configuration: which users may mount, and how much.

`python -m upcall.protocols.ecryptfs.mounting.allowed` prints the users, for units and init scripts; its exit status is
1 if there are none: then the source need not run.
"""

from __future__ import annotations

import grp
import os
import pwd
import sys
from typing import NamedTuple

from upcall import config
from upcall.config import ConfigError
from upcall.protocols.ecryptfs.mounting.denied import NOT_PERMITTED, Denied

MAX: int = 16  # mounts of a user
OFF = "mounting is off: the administrator can allow it"
START = "systemctl restart upcall-mount"  # the service, which does not run while nobody may mount


class MountRules(NamedTuple):
    """Of the configuration. `users`: names, and names of groups after @; empty: mounting is off."""

    users: tuple[str, ...] = ()
    max: int = MAX


def rules() -> MountRules:
    """ConfigError."""
    table = config.settings("mount")
    return MountRules(tuple(table.get("users", ())), table.get("max", MAX))


def check_allowed(uid: int, allowed: MountRules) -> None:
    """Denied unless [mount] users names the user or one of the user's groups, as the account database has them now.
    Looking them up may block on a name service."""
    try:
        name, gid = pwd.getpwuid(uid).pw_name, pwd.getpwuid(uid).pw_gid
    except KeyError:
        raise Denied(NOT_PERMITTED, f"uid {uid} is no user of this machine") from None
    groups = {f"@{_group(number)}" for number in os.getgrouplist(name, gid)} if _has_groups(allowed.users) else set()
    if name in allowed.users or groups & {*allowed.users}:
        return
    if not allowed.users:
        raise Denied(NOT_PERMITTED, f"{OFF}: {remedy(name)}")
    raise Denied(NOT_PERMITTED, f"{name} may not mount: the administrator can allow it: {remedy(name)}")


def remedy(name: str) -> str:
    """Returns what the administrator has to do."""
    return f'`[mount] users = ["{name}"]` in {config.SYSTEM}, then `{START}`'


def _has_groups(users: tuple[str, ...]) -> bool:
    return any(user.startswith("@") for user in users)


def _group(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return ""


def main() -> int:
    """Prints which users may mount. Returns the exit status."""
    try:
        users = rules().users
    except ConfigError as error:
        sys.stderr.write(f"upcall mounts serve: {error}\n")
        return os.EX_CONFIG
    sys.stdout.write(f"allowed: {', '.join(users)}\n" if users else "mounting is off: [mount] users names nobody\n")
    return 0 if users else 1


if __name__ == "__main__":
    sys.exit(main())

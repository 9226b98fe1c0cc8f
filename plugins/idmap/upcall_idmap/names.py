"""Maps "name@domain" to an id and back as libnfsidmap's method nsswitch does, by libc's name services (NSS)."""

from __future__ import annotations

import grp
import pwd
import re
import socket
from collections.abc import Callable
from typing import Final, NamedTuple

from upcall.core.errors import Refused
from upcall.protocols.request_key.messages import MAX_ID
from upcall_idmap.idmapd_conf import Settings

PATIENCE: Final = 3.0  # seconds, the time-out of a name service
NOBODY: Final = MAX_ID  # (uid_t) -2, for unknown names if there is no account "nobody"

_DIGITS = re.compile("0|[1-9][0-9]{0,9}")


class Services(NamedTuple):
    """Functions of libc's name services. LookupError if there is no entry."""

    user_id: Callable[[str], int]
    group_id: Callable[[str], int]
    user_name: Callable[[int], str]
    group_name: Callable[[int], str]
    own_domain: Callable[[], str]


class Found(NamedTuple):
    id: int
    known: bool  # False: the id is that of nobody


def _own_domain() -> str:
    """Returns the domain of the host's full name; "" if it has none."""
    try:
        return socket.gethostbyname_ex(socket.gethostname())[0].partition(".")[2]
    except OSError:
        return ""


LIBC: Final = Services(
    lambda name: pwd.getpwnam(name).pw_uid,
    lambda name: grp.getgrnam(name).gr_gid,
    lambda number: pwd.getpwuid(number).pw_name,
    lambda number: grp.getgrgid(number).gr_name,
    _own_domain,
)


def id_of(services: Services, settings: Settings, name: str, group: bool) -> Found:
    """Returns the id of a name in this host's domain; nobody's id for other names. May block."""
    look_up = services.group_id if group else services.user_id
    local_names = _local_names(settings, name, group)
    for local in local_names:
        try:
            return Found(look_up(local), True)
        except LookupError:
            continue
    if local_names and _DIGITS.fullmatch(local_names[-1]) and int(local_names[-1]) <= MAX_ID:
        return Found(int(local_names[-1]), True)  # "1000@domain": the server has no name for this id
    for nobody in (settings.nobody_group if group else settings.nobody_user, "nobody"):
        if nobody:
            try:
                return Found(look_up(nobody), False)
            except LookupError:
                continue
    return Found(NOBODY, False)


def name_of(services: Services, settings: Settings, number: int, group: bool) -> str:
    """Returns NAME@DOMAIN of an id. Refused if there is no such account. May block."""
    try:
        name = services.group_name(number) if group else services.user_name(number)
    except LookupError:
        raise Refused("no-such-name", why=f"there is no {'group' if group else 'user'} {number}") from None
    unstripped = settings.unstripped_groups if group else settings.unstripped_users
    return name if unstripped and "@" in name else f"{name}@{settings.domain}"


def _local_names(settings: Settings, name: str, group: bool) -> list[str]:
    """Returns the local names to look up for a name, in order; none if it is of another domain."""
    found = []
    if group and settings.reformat_group:
        user, at, domain = name.partition("@")
        short, dot, _ = domain.partition(".")
        if at and dot:
            found.append(f"{_bytes(short).upper().decode('utf-8', 'surrogatepass')}\\{user}")
    elif settings.unstripped_groups if group else settings.unstripped_users:
        found.append(name)
    user, at, domain = name.rpartition("@")
    if at and user and _bytes(domain).lower() == _bytes(settings.domain).lower():
        found.append(user)
    return found


def _bytes(text: str) -> bytes:
    """Returns the bytes whose case libnfsidmap changes (strcasecmp, toupper): only ASCII letters have one. In Unicode,
    U+212A KELVIN SIGN is a "k", too, and a foreign domain would pass for the own."""
    return text.encode("utf-8", "surrogatepass")

"""Finds the user's credential caches and keytabs, checks which may be used, and ranks them.

    the default cache, the others of its collection            if none of these fits the server:
    PREFIX_UID and PREFIX_UID_*, as PAM modules make them      if none of all these can be used:
    the user's client keytab, and in the machine's daemon the machine's keytab

A cache fits if it has a valid ticket for the server or its realm. Among those that fit, the principal of the mount
option `user=` comes first, then the order above applies.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from upcall.core.errors import Refused
from upcall_spnego.copies import Copies
from upcall_spnego.files import CACHE, KEYTAB, NotTrusted, trusted
from upcall_spnego.krb5 import FCC_NOFILE, Context, Held, Krb5Error, realm_of

PREFIX: Final = "/tmp/krb5cc"  # noqa: S108 - where libkrb5 itself looks
FITS, USABLE, USELESS = 2, 1, 0
MOST_FILES: Final = 64  # limit of PREFIX_UID_* files that are examined
MOST_PRINCIPALS: Final = 4  # limit of a keytab's principals that are tried
_MACHINE: Final = ("host/", "cifs/")

_IN_FILES = ("FILE", "WRFILE", "DIR")


class Wanted(NamedTuple):
    """The server, and the user whose credentials to use. `wish`: the principal of the mount option user=."""

    server: str  # cifs/HOST@REALM
    wish: str | None
    uid: int
    own: bool  # the request is for the daemon's own user, whose caches may be used
    machines: bool  # this is the machine's daemon, whose keytab may be used


class Candidate(NamedTuple):
    """A cache or a principal of a keytab, with its rank."""

    name: str  # for people
    opened: str  # the name to open: the cache or a copy; other users cannot change its target
    principal: str
    expires: int | None  # seconds since 1970
    rank: int  # FITS, USABLE or USELESS
    reason: str  # why it is USELESS: one of REASONS
    why: str  # its state, for people
    keytab: str = ""
    at_hand: bool = False  # it has a ticket for the server: no KDC is needed


def caches(krb5: Context, wanted: Wanted, copies: Copies, prefix: str = PREFIX) -> list[Candidate]:
    """Returns the examined caches, the best first. Examines further ones only if none fits so far."""
    if not wanted.own:
        return []
    found = [_judged(krb5, name, wanted, copies) for name in _named(krb5)]
    if not any(one.rank == FITS for one in found):
        known = {one.name for one in found}
        more = [name for name in _lying_about(prefix, wanted.uid) if name not in known]
        found += [_judged(krb5, name, wanted, copies) for name in more]
    return sorted(found, key=lambda one: (-one.rank, not wished(one.principal, wanted.wish)))


def keys(krb5: Context, wanted: Wanted) -> Iterator[Candidate]:
    """Yields the principals of the usable keytabs, the best of each keytab first."""
    if wanted.own:
        name = krb5.client_keytab()
        yield from _of_keytab(krb5, name, wanted, wanted.wish, ())
    if wanted.machines:
        yield from _of_keytab(krb5, krb5.machine_keytab(), wanted, wanted.wish, _MACHINE)


def wished(principal: str, wish: str | None) -> bool:
    """Returns whether the mount option user= names this principal: NAME, or NAME@REALM."""
    name, _, realm = (wish or "").partition("@")
    return bool(name) and principal in (wish, f"{name}@{realm.upper() or realm_of(principal)}")


def why_none(candidates: Iterable[Candidate], own: bool = True) -> Refused:
    """Returns the refusal if no candidate can be used. Prefers the reason that the user can fix most easily."""
    useless = [one for one in candidates if one.rank == USELESS]
    for reason in ("ticket-expired", "cache-refused"):
        for one in useless:
            if one.reason == reason:
                return Refused(reason, why=_said(one))
    nothing = "there is no credential cache and no keytab" if own else "the machine's keytab has no key that fits"
    return Refused("no-ticket", why="; ".join(map(_said, useless)) or nothing)


def _said(one: Candidate) -> str:
    return f"{one.name}: {one.why}"


# --- caches -----------------------------------------------------------------------------------------------------


def _named(krb5: Context) -> Iterable[str]:
    """Returns the names of the default cache and of the rest of its collection, without duplicates."""
    try:
        first = krb5.default_cache()
        if first.startswith(("FILE:", "MEMORY:")):
            return (first,)
        others = krb5.collection()
    except Krb5Error:  # type DIR without its folder
        return ()
    return dict.fromkeys((first, *(name for name in others if not name.startswith("MEMORY:"))))  # these are our copies


def _lying_about(prefix: str, uid: int) -> list[str]:
    """Returns the files PREFIX_UID and PREFIX_UID_*, those that the user owns first: any user can create others
    there."""
    folder, base = os.path.split(f"{prefix}_{uid}")
    try:
        with os.scandir(folder) as entries:
            found = [one for one in entries if one.name == base or one.name.startswith(f"{base}_")]
    except OSError:
        return []
    found.sort(key=lambda one: (_owner(one) != uid, one.name))
    return [f"FILE:{one.path}" for one in found[:MOST_FILES]]


def _owner(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_uid
    except OSError:  # removed meanwhile
        return -1


def _judged(krb5: Context, name: str, wanted: Wanted, copies: Copies) -> Candidate:
    try:
        opened = _openable(name, wanted.uid)
        held, copy = copies.look(krb5, opened)
    except NotTrusted as error:
        return Candidate(name, "", "", None, USELESS, "cache-refused", str(error))
    except OSError as error:
        return Candidate(name, "", "", None, USELESS, "no-ticket", error.strerror or "cannot be looked at")
    except Krb5Error as error:
        why = "nothing is there" if error.code == FCC_NOFILE else str(error)
        return Candidate(name, "", "", None, USELESS, "no-ticket", why)
    rank, expires, reason, why = _worth(held, wanted.server)
    at_hand = any(_same_server(one.server, wanted.server) and one.end > held.now for one in held.tickets)
    opened = copy if at_hand else opened  # new tickets must be stored in the user's cache, not in the copy
    return Candidate(name, opened, held.principal, expires, rank, reason, why, at_hand=at_hand)


def _openable(name: str, uid: int) -> str:
    """Returns the name by which a cache can be opened safely. NotTrusted. Caches that are not files need no check: the
    kernel (KEYRING) or a daemon (KCM) checks their owner."""
    kind, colon, rest = name.partition(":")
    if not colon or kind not in _IN_FILES:
        return name
    return f"FILE:{trusted(rest.removeprefix(':'), (uid,), CACHE)}"


def _worth(held: Held, server: str) -> tuple[int, int | None, str, str]:
    """Returns (rank, expiry in seconds since 1970, reason, why) of a cache."""
    home, there = realm_of(held.principal), realm_of(server)
    gates = {f"krbtgt/{home}": USABLE} | {f"krbtgt/{there or home}": FITS}
    best, end, expired = USELESS, 0, False
    for ticket in held.tickets:
        service, _, realm = ticket.server.rpartition("@")
        rank = FITS if _same_server(ticket.server, server) else gates.get(service, USELESS)
        if rank == USABLE and realm != home:
            rank = USELESS
        if rank != USELESS and ticket.end <= held.now:
            expired = True
        elif rank != USELESS and (rank, ticket.end) > (best, end):
            best, end = rank, ticket.end
    if best != USELESS:
        return best, end, "", "fits" if best == FITS else f"has no ticket for {there} yet"
    if expired:
        last = max(ticket.end for ticket in held.tickets)
        return USELESS, last, "ticket-expired", f"the ticket of {held.principal} has expired"
    return USELESS, None, "no-ticket", f"has no ticket of {held.principal} that leads anywhere"


def _same_server(held: str, server: str) -> bool:
    """Returns whether a ticket is for this server. If the server's realm is unknown (empty), any realm matches."""
    return held == server or (server.endswith("@") and held.startswith(server))


def reaches(krb5: Context, one: Candidate, server: str) -> bool:
    """Returns whether the candidate's cache now has a ticket for the server's realm."""
    gate = f"krbtgt/{realm_of(server)}@"
    try:
        held = krb5.look(one.opened)
    except Krb5Error:
        return False
    return any(ticket.server.startswith(gate) and ticket.end > held.now for ticket in held.tickets)


# --- keytabs ----------------------------------------------------------------------------------------------------


def _of_keytab(
    krb5: Context, name: str, wanted: Wanted, wish: str | None, prefixes: tuple[str, ...]
) -> Iterator[Candidate]:
    """Yields the principals of a keytab. `prefixes`: only principals with these prefixes, and machine accounts, which
    end in `$`; (): all."""
    try:
        kind, _, path = name.partition(":")
        if kind != "FILE":
            return  # not a file: its owner cannot be checked
        real = f"FILE:{trusted(path, (wanted.uid, 0), KEYTAB)}"
        names = krb5.principals(real)
    except FileNotFoundError:
        return
    except (NotTrusted, OSError, Krb5Error) as error:
        reason = "cache-refused" if isinstance(error, NotTrusted) else "no-ticket"
        yield Candidate(name, "", "", None, USELESS, reason, str(error))
        return
    fitting = [one for one in names if not prefixes or one.startswith(prefixes) or _is_account(one)]
    fitting.sort(key=lambda one: (not wished(one, wish), bool(prefixes) and not _is_account(one)))
    for principal in fitting[:MOST_PRINCIPALS]:
        memory = f"MEMORY:upcall-spnego-{principal}"
        why = "its key can get a ticket"
        yield Candidate(name, memory, principal, _kept(krb5, memory), USABLE, "", why, real)


def _is_account(principal: str) -> bool:
    return principal.rpartition("@")[0].endswith("$")


def _kept(krb5: Context, memory: str) -> int | None:
    """Returns the expiry of the tickets that this process has obtained with the key; None without any."""
    try:
        held = krb5.look(memory)
    except Krb5Error:
        return None
    return max((ticket.end for ticket in held.tickets if ticket.server.startswith("krbtgt/")), default=None)

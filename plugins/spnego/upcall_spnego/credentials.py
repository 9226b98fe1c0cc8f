"""Whose name we can act in: the user's caches and keytabs, which of them may be used, and which is the best.

    the default cache, the others of its collection            if none of them fits the server:
    PREFIX_UID and PREFIX_UID_*, as PAM modules make them      if none of all these can be used:
    the user's client keytab, and in the machine's daemon the machine's keytab

A cache fits if it has a ticket that is still valid for the server or its realm. Among those which fit, the
principal that mount was told of (`user=`) comes first, and then the order above.
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
MOST_FILES: Final = 64  # of those lying about that are looked at
MOST_PRINCIPALS: Final = 4  # of a keytab that are tried
_MACHINE: Final = ("host/", "cifs/")

_IN_FILES = ("FILE", "WRFILE", "DIR")


class Wanted(NamedTuple):
    """For which server, and by whom. `wish`: the principal that mount was told of."""

    server: str  # cifs/HOST@REALM
    wish: str | None
    uid: int
    own: bool  # the caches are of whoever is meant
    machines: bool  # this is the machine's daemon, and its keytab may be used


class Candidate(NamedTuple):
    """A cache or a principal of a keytab, and what is to be said of it."""

    name: str  # as the user knows it
    opened: str  # the name to open: the same cache or a copy, and nobody else can change what it leads to
    principal: str
    expires: int | None  # seconds since 1970
    rank: int  # FITS, USABLE or USELESS
    reason: str  # why it is USELESS: a word of REASONS
    why: str  # what is to be said of it, for people
    keytab: str = ""
    at_hand: bool = False  # the server's own ticket is there: no KDC will be asked


def caches(krb5: Context, wanted: Wanted, copies: Copies, prefix: str = PREFIX) -> list[Candidate]:
    """All that were looked at, the best first. More are looked for only while none fits."""
    if not wanted.own:
        return []
    found = [_judged(krb5, name, wanted, copies) for name in _named(krb5)]
    if not any(one.rank == FITS for one in found):
        known = {one.name for one in found}
        more = [name for name in _lying_about(prefix, wanted.uid) if name not in known]
        found += [_judged(krb5, name, wanted, copies) for name in more]
    return sorted(found, key=lambda one: (-one.rank, not wished(one.principal, wanted.wish)))


def keys(krb5: Context, wanted: Wanted) -> Iterator[Candidate]:
    """The principals of the keytabs that may be used, the best of each first."""
    if wanted.own:
        name = krb5.client_keytab()
        yield from _of_keytab(krb5, name, wanted, wanted.wish, ())
    if wanted.machines:
        yield from _of_keytab(krb5, krb5.machine_keytab(), wanted, wanted.wish, _MACHINE)


def wished(principal: str, wish: str | None) -> bool:
    """Whether mount meant this principal: NAME, or NAME@REALM."""
    name, _, realm = (wish or "").partition("@")
    return bool(name) and principal in (wish, f"{name}@{realm.upper() or realm_of(principal)}")


def why_none(candidates: Iterable[Candidate], own: bool = True) -> Refused:
    """The refusal if none can be used. What the user can mend soonest comes first."""
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
    """The default cache's name, and the rest of the collection's, each once. A file is a collection of one."""
    try:
        first = krb5.default_cache()
        if first.startswith(("FILE:", "MEMORY:")):
            return (first,)
        others = krb5.collection()
    except Krb5Error:  # a folder of caches (DIR) that is not there
        return ()
    return dict.fromkeys((first, *(name for name in others if not name.startswith("MEMORY:"))))  # which is our own


def _lying_about(prefix: str, uid: int) -> list[str]:
    """The user's own first: anybody can put any number of others there."""
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
    except OSError:  # it has just gone
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
    opened = copy if at_hand else opened  # tickets that the KDC gives belong into the user's own cache
    return Candidate(name, opened, held.principal, expires, rank, reason, why, at_hand=at_hand)


def _openable(name: str, uid: int) -> str:
    """Caches that are not files are the kernel's (KEYRING) or a daemon's (KCM), who know whose they are."""
    kind, colon, rest = name.partition(":")
    if not colon or kind not in _IN_FILES:
        return name
    return f"FILE:{trusted(rest.removeprefix(':'), (uid,), CACHE)}"


def _worth(held: Held, server: str) -> tuple[int, int | None, str, str]:
    """(rank, end of what it can be used for, reason, why)."""
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
    """Of a server whose realm is not known (an empty one) any realm's ticket will do."""
    return held == server or (server.endswith("@") and held.startswith(server))


def reaches(krb5: Context, one: Candidate, server: str) -> bool:
    """Whether there is a ticket for the server's realm by now."""
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
    """`prefixes`: of the principals that count, and those that end in `$`, a machine's account; none: all count."""
    try:
        kind, _, path = name.partition(":")
        if kind != "FILE":
            return  # whose it is, nobody could say
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
    """Until when what this process has got with the key is valid."""
    try:
        held = krb5.look(memory)
    except Krb5Error:
        return None
    return max((ticket.end for ticket in held.tickets if ticket.server.startswith("krbtgt/")), default=None)

"""Answers cifs.spnego requests: establishes Kerberos sessions with file servers, with the daemon's user's credentials.

The kernel receives a session key and the first token for the server. The cache or keytab is selected for each request
(`credentials`), so that kinit takes effect at once; libgssapi makes the token (`gssapi`).
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from typing import Any, Final

from upcall.core.errors import ModuleFailed, Refused
from upcall.process import machine
from upcall.protocols.request_key.cifs_spnego import MAX_KEY, MIN_KEY, Spnego, pack_payload, take_description
from upcall.protocols.request_key.messages import MAX_PAYLOAD, Ask, Instance, pack_ask, pack_instance, take_ask
from upcall.wire.envelope import Envelope
from upcall_spnego import credentials
from upcall_spnego.copies import Copies
from upcall_spnego.credentials import PREFIX, USELESS, Candidate, Wanted
from upcall_spnego.gssapi import GssError, Session, initiate
from upcall_spnego.krb5 import Context, Krb5Error, realm_of
from upcall_spnego.negtoken import KRB5, MS_KRB5, pack_negtokeninit
from upcall_spnego.refusals import refused
from upcall_spnego.waiting import Waiting

__all__ = ["SpnegoHandler", "explain", "handler"]

MECHANISMS: Final = {"krb5": KRB5, "mskrb5": MS_KRB5}
_ADDRESS = re.compile(r"[0-9.]+|.*:.*")
_ANOTHER_MAY_DO = frozenset({"no-ticket", "ticket-expired", "wrong-realm", "kdc-refused"})  # tries the next candidate
_HEAD = 16  # bytes of a payload before the key


class SpnegoHandler:
    """A Handler of cifs.spnego that implements Explaining. `prefix`: of credential caches made by PAM modules; tests
    pass another one."""

    services: tuple[str, ...] = ("cifs.spnego",)

    def __init__(self, prefix: str = PREFIX) -> None:
        self._prefix = prefix
        self.waiting = Waiting()
        self.copies = Copies()

    def lane(self, envelope: Envelope, /) -> str:
        """Returns one lane for each server: requests that wait for a KDC do not block those with valid tickets."""
        return f"cifs.spnego {_asked(envelope.body).host.lower()}"

    def answer(self, envelope: Envelope, /) -> bytes:
        """Returns the body of an Instance. It does not expire, because the kernel uses it once. May block while
        libkrb5 waits for a KDC."""
        asked = _asked(envelope.body)
        session = self._session(asked)
        blob = pack_negtokeninit(MECHANISMS[asked.sec], session.token)
        return pack_instance(Instance(0, pack_payload(session.key, _fitting(session, blob))))

    def explain(self, ask: bytes, /, contact: bool = False) -> dict[str, Any]:
        """Reports how this Ask would be answered, and why, without secrets. Contacts KDCs only with `contact`.

        {"answer": "would answer" or the reason of the refusal, "why", "server",
         "credential": one of the candidates or None, "candidates": [{"name", "principal", "expires", "verdict"}],
         "key", "blob": sizes in bytes, with `contact` and an answer}
        """
        asked = _asked(ask)
        told: dict[str, Any] = {"answer": "would answer", "why": "", "server": "", "credential": None}
        told["candidates"] = []
        try:
            with self.copies, Context() as krb5:
                wanted = _wanted(krb5, asked)
                told["server"] = wanted.server
                found = list(self._candidates(krb5, wanted))
            told["candidates"] = [_described(one) for one in found]
            usable = [one for one in found if one.rank != USELESS]
            if not usable:
                raise credentials.why_none(found, wanted.own)
            told["credential"] = _described(usable[0])
            if contact:
                session = self._session(asked)
                blob = pack_negtokeninit(MECHANISMS[asked.sec], session.token)
                told |= {"key": len(session.key), "blob": len(_fitting(session, blob))}
        except Refused as error:
            told |= {"answer": error.reason, "why": error.why}
        except (Krb5Error, ModuleFailed) as error:
            told |= {"answer": "module-failed", "why": str(error)}
        return told

    # --- credentials and session -----------------------------------------------------------------------------

    def _candidates(self, krb5: Context, wanted: Wanted) -> Iterator[Candidate]:
        """Yields the candidates, the best first. Opens keytabs only if no cache can be used."""
        found = credentials.caches(krb5, wanted, self.copies, self._prefix)
        yield from found
        if all(one.rank == USELESS for one in found):
            self.copies.sweep()
            yield from credentials.keys(krb5, wanted)

    def _session(self, asked: Spnego) -> Session:
        try:
            with self.copies, Context() as krb5:
                wanted = _wanted(krb5, asked)
                try:
                    return self._first(krb5, wanted)
                except Refused as error:
                    if error.reason != "unknown-service" or not (longer := _full_name(asked.host)):
                        raise
                    return self._first(krb5, wanted._replace(server=krb5.server(longer)))
        except Krb5Error as error:
            raise ModuleFailed(f"libkrb5: {error}") from None

    def _first(self, krb5: Context, wanted: Wanted) -> Session:
        """Establishes a session with the first candidate that works. If none does, raises the first one's refusal."""
        first: Refused | None = None
        found: list[Candidate] = []
        for one in self._candidates(krb5, wanted):
            found.append(one)
            if one.rank == USELESS:
                continue
            try:
                return self._initiated(krb5, wanted.server, one)
            except Refused as error:
                first = first or error
                if error.reason not in _ANOTHER_MAY_DO:
                    break
        raise first or credentials.why_none(found, wanted.own)

    def _initiated(self, krb5: Context, server: str, one: Candidate) -> Session:
        try:
            if one.at_hand:
                return initiate(server, one.opened)
            with self.waiting.for_kdc(realm_of(server) or realm_of(one.principal)):
                return initiate(server, one.opened, one.principal if one.keytab else "", one.keytab)
        except GssError as error:
            raise refused(error, server, one.principal, credentials.reaches(krb5, one, server)) from None


def _asked(body: bytes) -> Spnego:
    return take_description(take_ask(body).description)


def _wanted(krb5: Context, asked: Spnego) -> Wanted:
    """Parses the request. The machine's daemon also answers for root and for users without a daemon; for these with
    the machine's keytab only."""
    if asked.sec not in MECHANISMS:
        raise Refused("no-mechanism", why=f"sec={asked.sec}: {' and '.join(MECHANISMS)} are spoken here")
    uid = os.geteuid()
    own = uid == asked.creduid
    machines = (uid == machine.ROOT or not own) and machine.is_ours()
    if not own and not machines:
        raise Refused("not-permitted", why=f"asked for the credentials of uid {asked.creduid}, this is uid {uid}")
    wish = asked.user if own or asked.creduid == machine.ROOT else ""  # others must not choose the machine's key
    return Wanted(krb5.server(_name_of(asked.host)), wish or None, uid, own, machines)


def _name_of(host: str) -> str:
    """Returns the host's name in lower case, as cifs.upcall does. An address is kept: DNS is not trusted to name
    it."""
    return host.lower().removesuffix(".")


def _full_name(host: str) -> str:
    """Returns the full name of a short host name, by the resolver; "" if there is none. May block."""
    if "." in host or _ADDRESS.fullmatch(host):
        return ""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_CANONNAME)
    except OSError:
        return ""
    _, dot, domain = found[0][3].partition(".")
    return f"{_name_of(host)}.{_name_of(domain)}" if dot and domain else ""


def _fitting(session: Session, blob: bytes) -> bytes:
    """Returns the blob. Refused if its size or that of the session key is out of bounds: the kernel does not check."""
    if not MIN_KEY <= len(session.key) <= MAX_KEY:
        raise Refused("kdc-refused", why=f"a session key of {len(session.key)} bytes, at least {MIN_KEY} are needed")
    if _HEAD + len(session.key) + len(blob) > MAX_PAYLOAD:
        raise Refused("kdc-refused", why=f"a token of {len(blob)} bytes has no room in a key")
    return blob


def _described(one: Candidate) -> dict[str, Any]:
    verdict = f"{one.reason}: {one.why}" if one.reason else one.why
    return {"name": one.name, "principal": one.principal, "expires": one.expires, "verdict": verdict}


handler = SpnegoHandler()


def explain(description: str | bytes, contact: bool = False) -> dict[str, Any]:
    """Calls `SpnegoHandler.explain` for a key's description. PeerError if it does not have the kernel's format."""
    text = description.encode() if isinstance(description, str) else description
    return handler.explain(pack_ask(Ask(text, b"")), contact)

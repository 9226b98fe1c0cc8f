"""Resolves names to addresses: by /etc/hosts, then by DNS (dnspython). Sorts them as getaddrinfo(3) does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import dns.exception
import dns.message
import dns.name
import dns.rdatatype
import dns.resolver

from upcall.core.errors import Refused, UpcallError
from upcall.protocols.request_key.dns_resolver import FROM_DNS_A, FROM_NSS, MAX_EXPIRY
from upcall_dns import hosts, servers
from upcall_dns.order import ordered

LEAST_TTL = 1  # seconds: 0 would mean no expiry to the kernel
MOST_TTL = MAX_EXPIRY
NEGATIVE_TTL = 300  # seconds, limit for negative answers: people fix a name and try again
UNSAID_TTL = 5  # seconds, for /etc/hosts and negative answers without SOA: default_ttl of key.dns_resolver
MOST_ADDRESSES = 64


class NotThere(UpcallError):
    """A negative answer: there are no such records. `ttl`: seconds that it may be cached."""

    def __init__(self, name: str, ttl: int) -> None:
        self.ttl = ttl
        super().__init__(f"{name}: nothing there for {ttl} s")


class Records(NamedTuple):
    """The answer of a name server, which may be negative."""

    records: tuple[Any, ...]
    ttl: int


class Found(NamedTuple):
    addresses: tuple[str, ...]
    ttl: int
    source: int  # FROM_DNS_A, FROM_NSS


class Names:
    """Resolves names for one request. `deadline`: seconds of CLOCK_MONOTONIC. Not thread-safe."""

    def __init__(self, resolv_conf: Path, hosts_file: Path, port: int, deadline: float) -> None:
        self._hosts, self._deadline = hosts_file, deadline
        self._resolver = servers.resolver(resolv_conf, port)

    def addresses(self, name: str, families: tuple[int, ...], search: bool = True) -> Found:
        """Returns the addresses of a name, at least one, the best first. `families`: 4, 6 or both. `search`: use the
        search list of resolv.conf. NotThere; Refused if no name server answers in time."""
        literal = [text for family in families if (text := hosts.text_of(name, family))]
        near = literal or hosts.look_up(self._hosts, name, families)
        if near:
            return Found(_chosen(near), UNSAID_TTL, FROM_NSS)
        if any(hosts.text_of(name, family) for family in hosts.FAMILIES):
            raise NotThere(name, UNSAID_TTL)  # an address of another family
        return self._from_dns(name, families, search)

    def records(self, name: str, kind: str) -> Records:
        """Queries the records of one type (such as "SRV") of a name, without the search list. Refused."""
        return self._ask(dns.name.from_text(name), kind)

    def _from_dns(self, name: str, families: tuple[int, ...], search: bool) -> Found:
        failure: Refused | None = None
        ttl = NEGATIVE_TTL
        for candidate in self._candidates(name, search):
            found: list[str] = []
            least = MOST_TTL
            for family in families:
                try:
                    told = self._ask(candidate, "A" if family == 4 else "AAAA")
                except Refused as refused:
                    failure = failure or refused
                    continue
                if told.records:
                    found += [record.address for record in told.records]
                    least = min(least, told.ttl)
                else:
                    ttl = min(ttl, told.ttl)
            if found:
                return Found(_chosen(found), least, FROM_DNS_A)
        raise failure or NotThere(name, ttl)

    def _candidates(self, name: str, search: bool) -> Iterator[dns.name.Name]:
        """Yields the full names to try, as specified by resolv.conf(5)."""
        given = dns.name.from_text(name, None)
        if given.is_absolute() or not search:
            yield dns.name.from_text(name)
            return
        resolver = self._resolver
        suffixes = resolver.search or [resolver.domain]
        whole = given.concatenate(dns.name.root)
        first = len(given) > (1 if resolver.ndots is None else resolver.ndots)
        if first:
            yield whole
        for suffix in suffixes:
            try:
                candidate = given.concatenate(suffix)
            except dns.name.NameTooLong:
                continue
            if candidate != whole:
                yield candidate
        if not first:
            yield whole

    def _ask(self, name: dns.name.Name, kind: str) -> Records:
        """Queries the records of a full name. Refused if there is no answer in time."""
        try:
            message = self._resolve(name, kind).response
        except dns.resolver.NXDOMAIN as error:
            message = error.kwargs["responses"][name]
        except dns.exception.DNSException as error:
            raise _refused(name, error) from None
        chain = message.resolve_chaining()
        if chain.answer is not None:
            return Records(tuple(chain.answer), max(LEAST_TTL, min(chain.minimum_ttl, MOST_TTL)))
        authority = any(rrset.rdtype == dns.rdatatype.SOA for rrset in message.authority)
        ttl = min(chain.minimum_ttl, NEGATIVE_TTL) if authority else UNSAID_TTL
        return Records((), max(LEAST_TTL, ttl))

    def _resolve(self, name: dns.name.Name, kind: str) -> dns.resolver.Answer:
        """Queries all name servers, and slow ones again, until the deadline."""
        while True:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise Refused("no-name-server", why=f"{name}: there is no time left to ask")
            try:
                return self._resolver.resolve(name, kind, search=False, lifetime=left, raise_on_no_answer=False)
            except dns.resolver.NoNameservers as error:
                told = [one[3] for one in error.kwargs["errors"]]
                if self._resolver.edns >= 0 and ("FORMERR" in told or "NOTIMP" in told):
                    self._resolver.use_edns(-1)  # an old name server that does not support EDNS
                elif not any(isinstance(one, TimeoutError) for one in told):
                    raise


def _refused(name: dns.name.Name, error: dns.exception.DNSException) -> Refused:
    """Returns the refusal: whether no name server answered, or all failed."""
    told = [one[3] for one in error.kwargs.get("errors", [(0, 0, 0, "it is broken")])]
    reason = "no-name-server" if all(isinstance(one, OSError) for one in told) else "name-server-failed"
    return Refused(reason, why=f"{name}: {error}")


def _chosen(addresses: list[str]) -> tuple[str, ...]:
    return tuple(ordered(list(dict.fromkeys(addresses)))[:MOST_ADDRESSES])

"""Makes dnspython resolvers for the name servers of resolv.conf(5)."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import dns.exception
import dns.inet
import dns.message
import dns.nameserver
import dns.query
import dns.resolver

from upcall.core.errors import Refused

EDNS_PAYLOAD = 1232  # bytes: avoids IP fragmentation


def resolver(file: Path, port: int) -> dns.resolver.Resolver:
    """Reads resolv.conf. Called for each request, because the file changes. Refused if it is malformed."""
    made = dns.resolver.Resolver(configure=False)
    try:
        made.read_resolv_conf(str(file))  # older dnspython takes no Path
    except dns.resolver.NoResolverConfiguration:
        made.nameservers = ["127.0.0.1"]  # the default of resolv.conf(5)
    except (dns.exception.DNSException, ValueError) as error:
        raise Refused("no-name-server", why=f"{file}: {error}") from None
    addresses = [address for given in made.nameservers if dns.inet.is_address(address := str(given))]
    made.nameservers = [_Connected(address, port) for address in addresses]
    made.use_edns(0, 0, EDNS_PAYLOAD)
    return made


class _Connected(dns.nameserver.Do53Nameserver):
    """A name server that is queried over a connected socket, so that the kernel reports a closed port at once.

    A server that times out is treated as failed in this round. Otherwise dnspython would query it again after a sleep
    that may last beyond the deadline.
    """

    def query(
        self,
        request: dns.message.QueryMessage,
        timeout: float,
        source: str | None,
        source_port: int,
        max_size: bool,
        one_rr_per_rrset: bool = False,
        ignore_trailing: bool = False,
    ) -> dns.message.Message:
        try:
            if max_size:
                return dns.query.tcp(request, self.address, timeout, self.port)
            address = dns.inet.low_level_address_tuple((self.address, self.port))
            with socket.socket(dns.inet.af_for_address(self.address), socket.SOCK_DGRAM) as asking:
                asking.setblocking(False)
                asking.connect(address)
                return dns.query.udp(
                    request,
                    self.address,
                    timeout,
                    self.port,
                    ignore_unexpected=True,
                    raise_on_truncation=True,
                    sock=asking,
                    ignore_errors=True,
                )
        except dns.exception.Timeout:
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from None

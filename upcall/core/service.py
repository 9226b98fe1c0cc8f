"""What a service is to the broker: a name, how long its requesters wait, how many at once, and the check that an
answer must pass before anybody sees it. One entry per conversation. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from upcall.protocols.ecryptfs import packets as ecryptfs
from upcall.protocols.request_key import cifs_spnego, dns_resolver


class Service(NamedTuple):
    """`check(asked, answer)` raises PeerError on an answer that the requester must not see."""

    name: str
    patience: float  # seconds until the broker refuses
    contexts: int  # per uid
    reserve: int  # of these: left to the other uids, while any is registered
    check: Callable[[bytes, bytes], None]
    check_request: Callable[[bytes], object]
    local: bool  # may processes ask for it on the requesters' socket?
    absent: str = "refuse"  # without a daemon: or "start" one, or ask the "machine", which is its own daemon
    network: bool = False  # its handler parses what comes from the network: uid 0 is never asked, the machine is


# The kernel gives up after 3 s (ecryptfs_message_wait_timeout) and then leaves a context that a late answer
# could hit: half a second is left for the way back. It has 32 contexts, too (ecryptfs_message_buf_len), but for all
# uids together: a key module that hangs must leave some to the others.
ECRYPTFS = Service("ecryptfs", 2.5, 32, 8, ecryptfs.check_answer, ecryptfs.take_ask, local=False)

# The same packets, asked for by processes: they may wait longer than the kernel does.
KEY = Service("key", 10.0, 32, 0, ecryptfs.check_answer, ecryptfs.take_ask, local=True)

# A mount hangs for as long as this takes, and with it every other one; a KDC that is slow answers within seconds.
# A machine that boots, or whose server comes back, asks for everybody at once.
CIFS_SPNEGO = Service(
    "cifs.spnego", 8.0, 128, 0, cifs_spnego.check_answer, cifs_spnego.check_request, local=False, network=True
)

# Mounts and reconnections wait for it; a resolver gives up after some seconds, too.
DNS_RESOLVER = Service(
    "dns_resolver", 6.0, 128, 0, dns_resolver.check_answer, dns_resolver.check_request, local=False, network=True
)

SERVICES = {service.name: service for service in (ECRYPTFS, KEY, CIFS_SPNEGO, DNS_RESOLVER)}


class Notice(NamedTuple):
    """A service whose daemons are told, and answer nothing: what a source in a process of its own may send."""

    name: str
    network: bool = False  # as a Service's


NOTICES = {notice.name: notice for notice in (Notice("quota", network=True),)}


def with_contexts(count: int) -> dict[str, Service]:
    """The same services with `count` contexts each, a quarter of them held back where some are."""
    return {
        name: service._replace(contexts=count, reserve=count // 4 if service.reserve else 0)
        for name, service in SERVICES.items()
    }

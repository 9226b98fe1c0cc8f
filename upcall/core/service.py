"""What a service is to the broker: a name, how long its requesters wait, how many at once, and the check that an
answer must pass before anybody sees it. Which there are: upcall/protocols. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple


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


class Notice(NamedTuple):
    """A service whose daemons are told, and answer nothing: what a source in a process of its own may send."""

    name: str
    network: bool = False  # as a Service's


def with_contexts(services: Mapping[str, Service], count: int) -> dict[str, Service]:
    """The same services with `count` contexts each, a quarter of them held back where some are."""
    return {
        name: service._replace(contexts=count, reserve=count // 4 if service.reserve else 0)
        for name, service in services.items()
    }

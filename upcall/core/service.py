"""Describes a service to the broker: time-out, contexts, and the checks of requests and answers. Pure.

The services themselves: upcall/protocols.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple


class Service(NamedTuple):
    """What the broker must know of a kind of request. Immutable.

    `check(request, answer)`: both are bodies, in the service's format (docs/protocol.md). Raises PeerError on an
    answer that the requester must not see; the request is then refused with "bad-answer". Necessary because the
    kernel does not validate what it is given. Returns nothing and does not change the answer.
    `check_request(request)`: raises PeerError on a malformed body. Its result is ignored.
    Both run in the broker's loop: no I/O, and time linear in the size, which is at most 64 KiB.
    """

    name: str
    patience: float  # seconds from the request until the broker refuses it with "timed-out"
    contexts: int  # requests of one uid that may be pending at once
    reserve: int  # of these: not used while daemons of other uids are registered
    check: Callable[[bytes, bytes], None]
    check_request: Callable[[bytes], object]
    local: bool  # whether user-space requesters may ask for it, on the requesters' socket
    absent: str = "refuse"  # if no daemon is registered: "refuse", "start" one, or ask the "machine" daemon
    network: bool = False  # its handler parses network data: the machine's daemon is asked instead of root's


class Notice(NamedTuple):
    """A service without answers: what a source in a process of its own may send to daemons."""

    name: str
    network: bool = False  # as in Service


def with_contexts(services: Mapping[str, Service], count: int) -> dict[str, Service]:
    """Returns the services with `count` contexts each. Services with a reserve reserve a quarter of them."""
    return {
        name: service._replace(contexts=count, reserve=count // 4 if service.reserve else 0)
        for name, service in services.items()
    }

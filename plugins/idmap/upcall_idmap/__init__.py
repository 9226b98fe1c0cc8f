"""Maps names to ids and back for the kernel's NFSv4 client: keys of type id_resolver, by libc's name services.

Formats: upcall/protocols/request_key/id_resolver.py. The answers are those of nfsidmap(8) with its method nsswitch;
docs/idmap.md lists the differences.
"""

from __future__ import annotations

import time
import zlib
from pathlib import Path
from typing import Any, Final

from upcall.core.errors import PeerError, Refused
from upcall.protocols.request_key.id_resolver import TYPE, check_request, pack_id, pack_name, take_description
from upcall.protocols.request_key.messages import Instance, pack_instance, take_ask
from upcall.wire.envelope import Envelope
from upcall_idmap import idmapd_conf, names
from upcall_idmap.bounded import Bounded

LANES = 4  # a slow name service must not use all of the daemon's workers
EXPIRY: Final = 600  # seconds until an answer expires: nfsidmap's -t 600
NOBODYS_EXPIRY: Final = 60  # seconds, for unknown names: the account may be added soon
MARGIN = 0.1  # seconds before the deadline: refuses with a reason before the broker refuses with "timed-out"


class IdResolver:
    """A Handler for id_resolver. The arguments replace the system's file and name services, for tests."""

    services: tuple[str, ...] = (TYPE,)

    def __init__(self, conf: Path = idmapd_conf.FILE, services: names.Services = names.LIBC) -> None:
        self._conf, self._services = conf, services
        self._bounded = Bounded()

    def lane(self, envelope: Envelope) -> str:
        return f"{TYPE} {zlib.crc32(take_ask(envelope.body).description) % LANES}"

    def answer(self, envelope: Envelope) -> bytes:
        """Returns the body of an Instance. PeerError if the request is malformed; Refused if the id has no account, or
        the name service hangs."""
        check_request(envelope.body)
        return pack_instance(self._look_up(envelope.body, envelope.deadline_ns / 1e9)[0])

    def explain(self, ask: bytes, contact: bool = False) -> dict[str, Any]:
        """Implements upcall.handler.Explaining: reports the settings, and with `contact`, the answer."""
        check_request(ask)
        told: dict[str, Any] = {"answer": "would answer", "why": f"by {self._conf} and libc's name services"}
        if contact:
            try:
                instance, how = self._look_up(ask, 0.0)
                answer = instance.payload.rstrip(b"\0").decode()
                told["why"] += f": {answer} for {instance.expiry} s, {how}"
            except Refused as refused:
                told = {"answer": refused.reason, "why": refused.why}
        return {**told, "credential": None, "candidates": []}

    def _look_up(self, body: bytes, deadline: float) -> tuple[Instance, str]:
        """Returns the answer to an Ask, and where it is from, for people. `deadline`: seconds of CLOCK_MONOTONIC; 0:
        none."""
        query = take_description(take_ask(body).description)
        until = deadline - MARGIN if deadline else time.monotonic() + names.PATIENCE

        def work() -> tuple[Instance, str]:
            settings = idmapd_conf.read(self._conf, self._services.own_domain)
            if isinstance(query.subject, str):
                found = names.id_of(self._services, settings, query.subject, query.group)
                how = (
                    f"in the domain {settings.domain}" if found.known else "which stands for whoever is not known here"
                )
                return Instance(EXPIRY if found.known else NOBODYS_EXPIRY, pack_id(found.id)), how
            name = names.name_of(self._services, settings, query.subject, query.group)
            try:
                return Instance(EXPIRY, pack_name(name)), f"in the domain {settings.domain}"
            except PeerError as error:
                raise Refused("no-such-name", why=f"the kernel could not take the name: {error}") from None

        return self._bounded.call(work, min(until, time.monotonic() + names.PATIENCE))


id_resolver = IdResolver()

"""Maps SIDs to ids and back for the kernel's CIFS client: keys of type cifs.idmap, by winbind or sssd.

Formats: upcall/protocols/request_key/cifs_idmap.py. The answers are those of cifs.idmap(8), because the same plugin of
cifs-utils computes them; docs/idmap.md lists the differences.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from upcall.core.errors import PeerError, Refused
from upcall.protocols.request_key.cifs_idmap import (
    TYPE,
    Sid,
    check_request,
    pack_id,
    pack_sid,
    take_description,
    take_payload_id,
    take_payload_sid,
)
from upcall.protocols.request_key.messages import Instance, pack_instance, take_ask
from upcall.wire.envelope import Envelope
from upcall_idmap import EXPIRY, MARGIN
from upcall_idmap.bounded import Bounded
from upcall_idmap.cifs_plugin import FILE, Plugin
from upcall_idmap.names import PATIENCE


class CifsIdmap:
    """A Handler for cifs.idmap. `file`: the plugin of cifs-utils; tests pass another one."""

    services: tuple[str, ...] = (TYPE,)

    def __init__(self, file: Path = FILE) -> None:
        self._file = file
        self._plugin, self._bounded = Plugin(file), Bounded()

    def lane(self, envelope: Envelope) -> str:
        """Returns one lane for all requests: the plugin handles one call at a time."""
        take_description(take_ask(envelope.body).description)
        return TYPE

    def answer(self, envelope: Envelope) -> bytes:
        """Returns the body of an Instance. PeerError if the request is malformed; Refused if the SID or id is unknown,
        or the service hangs."""
        check_request(envelope.body)
        return pack_instance(self._look_up(envelope.body, envelope.deadline_ns / 1e9))

    def explain(self, ask: bytes, contact: bool = False) -> dict[str, Any]:
        """Implements upcall.handler.Explaining: reports the plugin, and with `contact`, its answer."""
        check_request(ask)
        try:
            told = {"answer": "would answer", "why": f"by {self._file.resolve(strict=True)}"}
        except OSError as error:
            told = {"answer": "no-name-service", "why": f"{self._file}: {error.strerror}; idmap-plugin(8)"}
        if contact:
            try:
                instance = self._look_up(ask, 0.0)
                wants_id = isinstance(take_description(take_ask(ask).description).subject, Sid)
                answer = take_payload_id(instance.payload) if wants_id else take_payload_sid(instance.payload)
                told["why"] += f": {answer} for {instance.expiry} s"
            except Refused as refused:
                told = {"answer": refused.reason, "why": refused.why}
        return {**told, "credential": None, "candidates": []}

    def _look_up(self, body: bytes, deadline: float) -> Instance:
        """Returns the answer to an Ask. `deadline`: seconds of CLOCK_MONOTONIC; 0: none."""
        query = take_description(take_ask(body).description)

        def work() -> bytes:
            try:
                if isinstance(query.subject, Sid):
                    return pack_id(self._plugin.id_of(query.subject, query.group))
                return pack_sid(self._plugin.sid_of(query.subject, query.group))
            except PeerError as error:
                raise Refused("no-such-name", why=f"the kernel could not take the answer: {error}") from None

        until = time.monotonic() + PATIENCE
        return Instance(EXPIRY, self._bounded.call(work, min(until, deadline - MARGIN) if deadline else until))


cifs_idmap = CifsIdmap()

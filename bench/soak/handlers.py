"""Implements handlers with constant answers, for testing the path to a handler and back."""

from __future__ import annotations

from upcall.protocols.request_key.cifs_spnego import pack_payload
from upcall.protocols.request_key.dns_resolver import Text, pack_text
from upcall.protocols.request_key.messages import Instance, pack_instance
from upcall.wire.envelope import Envelope


class _Constant:
    def __init__(self, service: str, payload: bytes) -> None:
        self.services: tuple[str, ...] = (service,)
        self._answer = pack_instance(Instance(60, payload))

    def lane(self, envelope: Envelope, /) -> str:
        return envelope.service

    def answer(self, envelope: Envelope, /) -> bytes:
        return self._answer


class _Told:
    """Receives notices and ignores them."""

    services: tuple[str, ...] = ("quota",)

    def lane(self, envelope: Envelope, /) -> str:
        return "quota"

    def answer(self, envelope: Envelope, /) -> bytes:
        return b""

    def notice(self, envelope: Envelope, /) -> None:
        return None


names = _Constant("dns_resolver", pack_text(Text(("192.0.2.1",))))
sessions = _Constant("cifs.spnego", pack_payload(b"k" * 16, b"b" * 200))
told = _Told()

"""Provides a check for the targets of key types."""

from __future__ import annotations

from collections.abc import Callable

from fuzz.target import taken
from upcall.protocols.request_key.messages import Ask, Instance, pack_ask, pack_instance


def let_through(check_answer: Callable[[bytes, bytes], None], description: bytes, payload: bytes) -> bool:
    """Returns whether the broker accepts this payload for a key with this description. Any exception but PeerError is
    a finding."""
    asked, answer = pack_ask(Ask(description, b"")), pack_instance(Instance(60, payload))

    def check() -> bool:
        check_answer(asked, answer)
        return True

    return taken(check) is True

"""What the targets of types of keys have in common."""

from __future__ import annotations

from collections.abc import Callable

from fuzz.target import taken
from upcall.protocols.request_key.messages import Ask, Instance, pack_ask, pack_instance


def let_through(check_answer: Callable[[bytes, bytes], None], description: bytes, payload: bytes) -> bool:
    """Whether the broker takes this payload for a key of this description. PeerError is the only other outcome."""
    asked, answer = pack_ask(Ask(description, b"")), pack_instance(Instance(60, payload))

    def check() -> bool:
        check_answer(asked, answer)
        return True

    return taken(check) is True

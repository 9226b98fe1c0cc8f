"""Implements message handlers for tests."""

from __future__ import annotations

import os
from pathlib import Path

from upcall.core.errors import ModuleFailed, Refused
from upcall.wire.envelope import Envelope


class Telling:
    """Answers a request with its body, and writes notices to a file."""

    services = ("test.echo",)

    def lane(self, envelope: Envelope) -> str:
        return "echo"

    def answer(self, envelope: Envelope) -> bytes:
        if envelope.body == b"refuse":
            raise Refused("no-key", why="there is none in the drawer")
        return envelope.body

    def notice(self, envelope: Envelope) -> None:
        if envelope.body == b"fail":
            raise ModuleFailed("cannot be told")
        with Path(os.environ["TOLD"]).open("ab") as told:
            told.write(envelope.body + b"\n")


class QuotaTelling(Telling):
    services = ("quota",)


class Deaf:
    """A handler that does not support notices."""

    services = ("test.echo",)

    def lane(self, envelope: Envelope) -> str:
        return "echo"

    def answer(self, envelope: Envelope) -> bytes:
        return b""


telling, deaf, quota_telling = Telling(), Deaf(), QuotaTelling()

"""Checks a message handler against the contract, as a pytest class to inherit:

    class TestMyHandler(HandlerContract):
        handler = handler

        def asking(self) -> Envelope: ...

Requests may be refused: the test machine may have no tickets and no servers. But each result must be bytes, or one of
the errors of `Handler.answer`. `upcall plugin check` runs the same checks.
"""

from __future__ import annotations

import pytest

from upcall.handler import Handler
from upcall.testing.checks.handlers import HANDLER_CHECKS, HandlerCheck
from upcall.testing.subject import NotApplicable
from upcall.wire.envelope import Envelope

__all__ = ["HANDLER_CHECKS", "HandlerContract"]


class HandlerContract:
    """Runs one test, `test_contract`, for each check."""

    handler: Handler

    def asking(self) -> Envelope:
        """Returns a valid request for the handler, whether it can be granted on the test machine or not. Override
        it."""
        raise NotImplementedError("`asking` must say what the handler can be asked")

    @pytest.mark.parametrize("check", HANDLER_CHECKS, ids=lambda check: check.__name__)
    def test_contract(self, check: HandlerCheck) -> None:
        try:
            check(self.handler, self.asking())
        except NotApplicable as why:
            pytest.skip(str(why))

"""The refusal of a mount, with an exit status and a text for the person who asked: what is wrong, and the remedy."""

from __future__ import annotations

import os
from typing import Final

from upcall.core.errors import UpcallError

WRONG: Final = os.EX_USAGE
UNAVAILABLE: Final = os.EX_UNAVAILABLE
FAILED: Final = os.EX_OSERR
LATER: Final = os.EX_TEMPFAIL  # it may be granted later
NOT_PERMITTED: Final = os.EX_NOPERM
MISCONFIGURED: Final = os.EX_CONFIG


class Denied(UpcallError):
    """A request that is refused. `status`: an exit status of sysexits.h."""

    def __init__(self, status: int, text: str) -> None:
        self.status = status
        super().__init__(text)

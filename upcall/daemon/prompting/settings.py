"""Methods, times and bounds of prompts."""

from __future__ import annotations

from typing import Final, NamedTuple

WAYS: Final = ("agent", "pinentry", "systemd")  # methods of prompting: see upcall.daemon.prompting.methods
PIN_TIME, PROMPT_TIME = 900.0, 60.0  # seconds: how long a PIN is kept, and how long a person may take for it
MARGIN = 2.0  # seconds that a request keeps for its work, once what was asked for is there
MAX_OPEN = 8  # prompts, one after the other before one person
HINT = "run `upcall prompt` in a terminal, and try again"


class PromptSettings(NamedTuple):
    """Times in seconds."""

    ways: tuple[str, ...] = WAYS  # how people are asked, the best first
    pinentry: str | None = None  # the program; None: "pinentry", in PATH
    pin_time: float = PIN_TIME  # how long a PIN is kept, from when the token first took it; 0: not at all
    prompt_time: float = PROMPT_TIME  # how long a person may take for one
    wrong: int = 2  # PINs, after which nobody is asked: one less than the fewest that lock a token
    tries: int = 3  # of a passphrase, in one prompt
    quiet: float = 10.0  # after a prompt was cancelled or ignored, nobody is asked for so long

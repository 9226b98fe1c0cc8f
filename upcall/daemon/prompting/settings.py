"""Defines methods, times and limits of prompts."""

from __future__ import annotations

from typing import Final, NamedTuple

WAYS: Final = ("agent", "pinentry", "systemd")  # methods of prompting: see upcall.daemon.prompting.methods
PIN_TIME, PROMPT_TIME = 900.0, 60.0  # seconds: how long a PIN is kept, time-out of a prompt
MARGIN = 2.0  # seconds of a request's time that are reserved for its work after the prompt
MAX_OPEN = 8  # limit of open prompts; one is shown at a time
HINT = "run `upcall prompt` in a terminal, and try again"
WAIT = "wait for some seconds, and try again"
LOCKED_MEANWHILE = "it was locked meanwhile"


class PromptSettings(NamedTuple):
    """Times in seconds."""

    ways: tuple[str, ...] = WAYS  # methods of prompting, tried in order
    pinentry: str | None = None  # path of the program; None: "pinentry", in PATH
    pin_time: float = PIN_TIME  # how long a PIN is kept after the token first accepted it; 0: not at all
    prompt_time: float = PROMPT_TIME  # time-out of a prompt
    wrong: int = 2  # wrong PINs after which no prompt opens: one less than the fewest that lock a token
    tries: int = 3  # passphrases in one prompt
    quiet: float = 10.0  # time without prompts after one was cancelled or timed out

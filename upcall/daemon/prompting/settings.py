"""Defines times and limits of prompts."""

from __future__ import annotations

from typing import NamedTuple

PIN_TIME, PROMPT_TIME = 900.0, 60.0  # seconds: how long a PIN is kept, time-out of a prompt
MARGIN = 2.0  # seconds of a request's time that are reserved for its work after the prompt
MAX_OPEN = 8  # limit of open prompts; one is shown at a time
HINT = "run `upcall prompt` in a terminal, and try again"


class Settings(NamedTuple):
    """Times in seconds."""

    pin_time: float = PIN_TIME  # how long a PIN is kept after the token first accepted it; 0: not at all
    prompt_time: float = PROMPT_TIME  # time-out of a prompt
    wrong: int = 2  # wrong PINs after which no prompt opens: one less than the fewest that lock a token
    tries: int = 3  # passphrases in one prompt
    quiet: float = 10.0  # time without prompts after one was cancelled or timed out

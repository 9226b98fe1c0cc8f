"""Fuzzes the broker's core with daemons of several uids that start, end, hang and send wrong answers. See
fuzz.router."""

from __future__ import annotations

from fuzz import router


def _steps(*steps: tuple[int, int, int, int]) -> bytes:
    return b"".join(map(bytes, steps))


_HELO, _ASK, _ANSWER, _QUIT, _GONE, _WAIT, _STATE, _OTHER = 4, 0, 6, 11, 12, 13, 14, 15
SEEDS = [
    _steps((_HELO, 0, 0, 0), (_ASK, 0, 0, 0), (_ANSWER, 1, 0, 0), (_ANSWER, 1, 0, 0)),
    _steps((_HELO, 0, 0, 0), (_HELO, 1, 0, 0), (_ASK, 0, 1, 0), (_ANSWER, 0, 0, 0), (_GONE, 1, 0, 0)),
    _steps((_HELO, 0, 0, 0), (_ASK, 0, 0, 0), (_HELO, 0, 0, 3), (_ANSWER, 1, 1, 0), (_ANSWER, 1, 0, 0)),
    _steps((_ASK, 0, 2, 0), (_ASK, 0, 2, 0), (_HELO, 0, 0, 0), (_QUIT, 0, 0, 0), (_ANSWER, 1, 0, 0), (_WAIT, 0, 0, 3)),
    _steps((_HELO, 2, 0, 0), (_ASK, 0, 3, 0), (_ANSWER, 1, 0, 4), (_ANSWER, 1, 0, 6), (_ANSWER, 1, 0, 2)),
    _steps(
        (_HELO, 1, 3, 0), (_ASK, 1, 0, 0), (_STATE, 0, 4, 0), (_ASK, 1, 0, 0), (_OTHER, 1, 0, 0), (_OTHER, 1, 0, 2)
    ),
]
MOST = 1024
MEMORY = 4 << 20


def run(data: bytes) -> None:
    router.play(data)

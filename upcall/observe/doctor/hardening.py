"""Checks the privileges that broker and daemon have dropped (upcall/process/hardening.py)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from upcall.observe.doctor.findings import Finding, note, ok, problem
from upcall.observe.doctor.system import Scene
from upcall.process.hardening import OFF


def held(scene: Scene) -> Iterator[Finding]:
    """Checks those that run and report it."""
    if scene.broker.status is not None:
        yield from judged("the broker", scene.broker.status["broker"].get("hardening", {}))
    if scene.daemon.status is not None:
        yield from judged("the daemon", scene.daemon.status.get("hardening", {}))


def judged(who: str, said: Mapping[str, str]) -> Iterator[Finding]:
    """Checks one process, by its status. Yields nothing if the status has no such part."""
    missing = {name: said[name] for name in ("seccomp", "landlock") if said.get(name, "no").startswith("no: ")}
    if any(why == f"no: {OFF}" for why in missing.values()):
        remedy = "take `broker = false` and `daemon = false` out of [hardening], and restart it"
        yield problem(f"{who} may do whatever its user may: {OFF}", remedy)
    elif missing:
        yield note(f"{who}: " + "; ".join(f"{name}: {why}" for name, why in missing.items()))
    elif said:
        yield ok(f"{who}: seccomp, Landlock {said['landlock']}, capabilities: {said['capabilities']}")

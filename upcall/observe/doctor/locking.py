"""Checks that the daemon added keys at login, and that events lock the keys."""

from __future__ import annotations

from collections.abc import Iterator

from upcall.observe.doctor.findings import Finding, note, ok, problem
from upcall.observe.doctor.system import Scene


def added(scene: Scene) -> Iterator[Finding]:
    """Checks the keys marked auto, by the daemon's report from its start."""
    status = scene.daemon.status
    if status is None or "not_added" not in status:
        return
    for one in status["not_added"]:
        remedy = "fix it, then add the key: upcall key add; at the next login the daemon does so"
        yield problem(f"a key was not added when the daemon started: {one['file']}: {one['why']}", remedy)
    if not status["not_added"]:
        yield ok("the daemon has added the keys that are marked for it")


def listened_to(scene: Scene) -> Iterator[Finding]:
    """Checks that the daemon listens to logind, and whether the keys are locked now."""
    status = scene.daemon.status
    if status is None or "locking" not in status:
        return
    locking = status["locking"]
    events = ", ".join(locking["lock_on"])
    if locking["lock_on"] and not locking["listening"]:
        why = locking["why"] or "not yet"
        yield note(f"logind is not connected ({why}): {events} lock no keys", "`upcall lock`, or [keys] lock-after")
    elif events:
        yield ok(f"logind is connected: {events} lock the keys")
    else:
        yield ok("no event locks the keys, as configured")
    if status.get("held"):
        yield note(f"all keys are locked: {', '.join(status['held'])}", "if you need them now", "upcall unlock")

"""Checks that the quota source is connected to the broker and receives warnings."""

from __future__ import annotations

from collections.abc import Iterator

from upcall.observe.doctor.findings import Finding, note, ok, problem
from upcall.observe.doctor.hardening import judged
from upcall.observe.doctor.system import Scene

UNIT = "upcall-quota.service"


def listening(scene: Scene) -> Iterator[Finding]:
    """Checks the quota source by its status."""
    status = scene.broker.status
    if status is None or "quota" not in status:
        return  # only root gets this part of the status
    quota = status.get("quota", {})
    if not quota:
        if status["broker"]["uid"] == 0:
            remedy = "start it, if quota warnings are to be delivered"
            yield note("no quota source is connected to the broker", remedy, start_command(scene))
        return
    if not quota["listening"]:
        yield problem(f"quota warnings are not received: {quota['why']}", "restart the quota source")
    elif quota["lost"]:
        yield note(f"quota warnings are received, and {quota['lost']} were lost", "the next reading replaces them")
    else:
        yield ok("quota warnings are received")
    if "hardening" in quota:
        yield from judged("the quota source", quota["hardening"])


def start_command(scene: Scene) -> str:
    """Returns the command that starts the source of the examined broker."""
    service = scene.service_command("start", UNIT) if scene.folder is None else ""
    return service or f"upcall quota serve{scene.runtime_option()} &"

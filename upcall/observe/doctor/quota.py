"""Whether quota warnings reach the broker."""

from __future__ import annotations

from collections.abc import Iterator

from upcall.observe.doctor.findings import Finding, note, ok, problem
from upcall.observe.doctor.system import Scene


def listening(scene: Scene) -> Iterator[Finding]:
    status = scene.broker.status
    if status is None or "quota" not in status:
        return  # others than root are not told
    quota = status.get("quota", {})
    if not quota:
        if status["broker"]["uid"] == 0:
            yield note("the broker does not listen to quota warnings", "start it with --quota, if it is to")
    elif not quota["listening"]:
        yield problem(f"the broker does not hear quota warnings: {quota['why']}", "start root's broker anew")
    elif quota["lost"]:
        yield note(f"the broker hears quota warnings, and has lost {quota['lost']}", "they come again in time")
    else:
        yield ok("the broker hears quota warnings")

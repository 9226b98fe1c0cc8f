"""Predicts the answer to a key request: request-key's line, the broker's checks, the daemon, and its handler."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from upcall.core.errors import PeerError, Refused, UsageError, error_words
from upcall.process import machine
from upcall.process.connection import BrokerConnection, NoBroker
from upcall.process.paths import SYSTEM_FOLDER, Place, find_place
from upcall.protocols.request_key import origin_check as gate
from upcall.protocols.request_key.conf import RequestedKey
from upcall.protocols.request_key.explain.child import explained_as
from upcall.protocols.request_key.install.key_makers import standing
from upcall.protocols.request_key.install.system import System
from upcall.protocols.request_key.key_types import KEY_TYPES
from upcall.protocols.request_key.messages import Ask, Described, pack_ask

WOULD = "would answer"
_PERMISSIONS = 0x39010000  # what the kernel gives
_ROOT = 0
_SERVICES = {name: key_type.service for name, key_type in KEY_TYPES.items()}

Report = dict[str, Any]


def explain(key: RequestedKey, folder: Path, contact: bool, system: System | None = None) -> Report:
    """Returns the reports of all steps by name. "answer" and "why" are those of the first step that would refuse.

    {"key", "request-key": as of `upcall request-key status`, "gate": {"uid", "answer", "why"},
     "daemon": {"uid", "pid", "without", "answer", "why"}, "handler": its report, "answer", "why"}

    `folder`: of the broker's sockets. `contact`: the handler may contact servers. PermissionError if the daemon
    belongs to another user and this process is not root. Blocks for up to PATIENCE seconds of explain/child.py.
    """
    report: Report = {"key": {name: _shown(text) for name, text in key._asdict().items()}}
    report["request-key"] = _request_key(system or System(), key)
    service, report["gate"] = key.type.decode("ascii"), _gate(key)
    uid: int | None = report["gate"]["uid"]
    if uid is not None:
        _check_may_look(uid)
        report["daemon"] = daemon = _daemon(folder, service, uid)
        answering: int = daemon["uid"]
        _check_may_look(answering)
        body = pack_ask(Ask(key.description, key.callout))
        report["handler"] = explained_as(answering, service, body, contact)
    steps: list[Report] = [report[name] for name in ("request-key", "gate", "daemon", "handler") if name in report]
    first = next((one for one in steps if one["answer"] != WOULD), steps[-1])
    return report | {"answer": first["answer"], "why": first.get("why", "")}


def _request_key(system: System, key: RequestedKey) -> Report:
    found = standing(system, key)
    problem = "; ".join(found.problems) or (f"request-key {why}" if (why := system.request_key()) else "")
    if found.line is not None and not found.ours:
        problem = f"{found.line} gives it to {found.line.program}"
    return found.report() | {"answer": "not-asked" if problem else WOULD, "why": problem}


def _gate(key: RequestedKey) -> Report:
    """Runs the broker's checks of the request. Not those of the requesting process: there is none yet."""
    kind = key.type.decode("ascii")
    described = Described(kind, _ROOT, _ROOT, _PERMISSIONS, key.description)
    try:
        if kind not in KEY_TYPES:
            raise Refused("unknown-type", why=f"the broker knows no keys of type {kind!r}")
        want = gate.wanted(described)
        _SERVICES[kind].check_request(pack_ask(Ask(key.description, key.callout)))
    except Refused as error:
        return {"uid": None, "answer": error.reason, "why": error.why}
    except PeerError as error:
        return {"uid": None, "answer": "bad-request", "why": str(error)}
    from upcall.broker.settings import configured

    uid = configured(_SERVICES).owners.get(kind, want.uid)
    return {"uid": machine.uid() if uid == _ROOT else uid, "answer": WOULD, "why": ""}


def _daemon(folder: Path, service: str, uid: int) -> Report:
    """Determines the daemon that would be asked: the machine's instead of the user's if so configured."""
    from upcall.broker.settings import configured

    without = configured(_SERVICES).services[service].absent
    report: Report = {"uid": uid, "pid": None, "without": without, "answer": WOULD, "why": ""}
    try:
        with BrokerConnection(folder) as client:
            pids = {one["uid"]: one["pid"] for one in client.status()["daemons"]}
    except (NoBroker, Refused, OSError) as error:
        return report | {"answer": "no-broker", "why": f"{error_words(error)}{_own_broker(folder)}"}
    if not Place(folder).request_key_socket.exists():
        return report | {"answer": "no-broker", "why": "the broker there is not root's: the kernel does not ask it"}
    if uid not in pids and without == "machine":
        report["uid"] = machine.uid()
        if os.geteuid() != _ROOT:
            return report  # only root can see whether the machine's daemon is registered
    report["pid"] = pids.get(report["uid"])
    if report["pid"] is not None:
        return report
    if without == "start":
        return report | {"why": "none is registered: one would be started"}
    return report | {"answer": "no-daemon", "why": f"no daemon of uid {report['uid']} is registered"}


def _own_broker(folder: Path) -> str:
    """Returns, as the end of a sentence, that the user's own broker runs, if it does, and does not help here."""
    with contextlib.suppress(OSError, UsageError):
        own = find_place()
        if folder == SYSTEM_FOLDER != own.folder and own.socket.exists():
            return f"; your own broker, in {own.folder}, is not asked by the kernel"
    return ""


def _check_may_look(uid: int) -> None:
    if os.geteuid() not in (_ROOT, uid):
        raise PermissionError(f"the credentials of uid {uid} are asked for, and only root may look at those")


def _shown(text: bytes) -> str:
    return text.decode(errors="backslashreplace")

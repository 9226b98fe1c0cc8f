"""Calls a handler's `explain` in a child process with the uid of the daemon that would answer.

Only such a process finds that user's credentials as the daemon does. Besides, no plugin runs as root for another user.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import select
import signal
import subprocess
import sys
import time
import traceback
from typing import Any, Final

from upcall import config
from upcall.core.errors import ModuleFailed, PeerError, Refused, UpcallError, UsageError
from upcall.handler import Explaining
from upcall.kernel import keyring
from upcall.kernel.process import harden
from upcall.keys.plugins import handlers, load_handler
from upcall.process import machine
from upcall.process import start_python as startpython

PATIENCE: Final = 30.0  # seconds: with `contact`, a KDC or a DNS server may be slow
MAX_REPORT: Final = 1 << 20  # bytes

Report = dict[str, Any]


def explained_as(uid: int, service: str, ask: bytes, contact: bool) -> Report:
    """Returns the report of this user's handler about a request; it has at least "answer" and "why".

    `ask`: the body of an Ask. `contact`: the handler may contact servers. Blocks for up to PATIENCE seconds. If the
    child fails, "answer" is "module-broke"; "traceback" is that of the handler's exception. UsageError if there is no
    such user. The user controls the child process, so the report is not trusted: it is for display only.
    """
    asked = {"service": service, "ask": ask.hex(), "contact": contact}
    process = _start(uid)
    try:
        data = _talk(process, json.dumps(asked).encode())
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict) and isinstance(found.get("answer"), str):
        return found
    why = f"{sys.executable} as uid {uid} said nothing within {PATIENCE:.0f} s"
    return {"answer": "module-broke", "why": f"{why}, or no sense; can that user read it?"}


def _start(uid: int) -> subprocess.Popen[bytes]:
    other: dict[str, Any] = {"env": startpython.cleaned()} if uid == os.geteuid() else _of(uid)
    return subprocess.Popen(
        startpython.command("upcall.protocols.request_key.explain"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # no controlling terminal: another user's process could inject input (TIOCSTI)
        **other,
    )


def _of(uid: int) -> dict[str, Any]:
    """Returns Popen's arguments for another user's ids, groups and a clean environment. UsageError."""
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        raise UsageError(f"there is no user with uid {uid}") from None
    environment = {"HOME": entry.pw_dir, "USER": entry.pw_name, "LOGNAME": entry.pw_name}
    environment |= {"PATH": startpython.PATH, "LANG": "C.UTF-8", "XDG_RUNTIME_DIR": f"/run/user/{uid}"}
    environment |= machine.handed_over() if uid == machine.uid() else {}
    groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
    return {"user": uid, "group": entry.pw_gid, "extra_groups": groups, "env": environment, "cwd": "/"}


def _talk(process: subprocess.Popen[bytes], asked: bytes) -> bytes:
    """Sends the request and reads the child's output to its end. Empty if it exceeds MAX_REPORT or PATIENCE."""
    if process.stdin is None or process.stdout is None:
        return b""
    with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
        pipe.write(asked)
    said, deadline = b"", time.monotonic() + PATIENCE
    while len(said) <= MAX_REPORT and select.select([process.stdout], [], [], max(0, deadline - time.monotonic()))[0]:
        chunk = os.read(process.stdout.fileno(), 65536)
        if not chunk:
            return said
        said += chunk
    return b""


# --- in the child ----------------------------------------------------------------------------------------------


def run() -> None:
    """The child: reads a request from stdin and writes the report to stdout, both as JSON."""
    harden()
    asked = json.load(sys.stdin)
    with contextlib.suppress(OSError):  # EDQUOT: the user's key quota may be used up
        keyring.join_session_and_link_user_keyring()  # as the daemon does
    found = explained(asked["service"], bytes.fromhex(asked["ask"]), asked["contact"])
    out = json.dumps(found, default=lambda value: f"<{type(value).__name__}>")
    os.write(1, out.encode())


def explained(service: str, ask: bytes, contact: bool) -> Report:
    """Calls the handler in this process and returns its report. Errors become a report: "answer" and "why"."""
    try:
        spec = _spec(service)
        handler = load_handler(spec, service)
        if not isinstance(handler, Explaining):
            raise ModuleFailed(f"handler {spec}: cannot explain itself")
        found = handler.explain(ask, contact)
        if not isinstance(found, dict) or not isinstance(found.get("answer"), str):
            raise ModuleFailed(f"handler {spec}: explains nothing")
    except Refused as error:
        return {"answer": error.reason, "why": error.why}
    except UpcallError as error:
        reason = "bad-request" if isinstance(error, PeerError) else "module-failed"
        return {"answer": reason if not isinstance(error, UsageError) else "no-service", "why": str(error)}
    except Exception as error:  # noqa: BLE001 - a handler may raise anything, and its text may hold anything
        trace = traceback.format_exception(error)
        return {"answer": "module-broke", "why": type(error).__name__, "traceback": "".join(trace)}
    return found


def _spec(service: str) -> str:
    found = handlers()
    if service not in found:
        others = f"; there are handlers for {', '.join(found)}" if found else ""
        raise UsageError(f"no handler for {service!r} is installed{others}")
    configured = config.load()
    if not configured.allows(service):
        raise UsageError(configured.refusal(service))
    return found[service]

"""Runs processes with the session keyrings that systemd, cron or a logout leave, for tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

# Code that runs before the program: makes a session keyring without links, or a revoked one of an ended login.
SESSIONS = {
    "linked": "k.join_session_and_link_user_keyring()",
    "bare": "k._call('join', 1, 0)",
    "revoked": "k.join_session_and_link_user_keyring(); k.revoke(-3)",
}


def within(session: str, *arguments: str) -> list[str]:
    """Returns arguments for Python that run the program in such a session."""
    begin = f"import os, sys; from upcall.kernel import keyring as k; {SESSIONS[session]}; "
    return ["-c", begin + "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])", *arguments]


def run_within(session: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Runs the program in such a session. Returns its output. Asserts that it succeeds."""
    done = subprocess.run(
        [sys.executable, *within(session, *arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **(environment or {})},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

"""Locates `upcall-request-key`, the forwarder: request-key runs it as root, once for each key request of the kernel.

It is a C program (forward.c, decide.c, host.c), compiled when the package is built (build.py). If it could not be
compiled, a Python program (standin.py) takes its place. See docs/request-key.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from upcall.process import start_python as startpython

PROGRAM: Final = Path(__file__).with_name("upcall-request-key")
STANDIN: Final = Path(__file__).with_name("standin.py")
SESSION: Final = PROGRAM.with_name("upcall-session")  # clears PAM's environment, for upcall.install.sessions
SYSTEM_PYTHON: Final = Path("/usr/bin/python3")


def program() -> Path:
    """Returns the path of the compiled program if it runs on this machine, otherwise that of the stand-in. Runs the
    program once with --version; may block for 10 s."""
    return PROGRAM if _runs([str(PROGRAM)]) else STANDIN


def command() -> list[str]:
    """Returns the command for a line of request-key.conf, without the final `%k`. Paths are absolute. May block as
    `program`."""
    found = program()
    return [str(found)] if found == PROGRAM else [*_interpreter(), str(found)]


def _interpreter() -> list[str]:
    """Returns the command for Python, without environment and site-packages: the system's if possible, because a user
    may be able to change another one."""
    options = ["-I", "-S"]
    if _runs([str(SYSTEM_PYTHON), *options, str(STANDIN)]):
        return [str(SYSTEM_PYTHON), *options]
    return [os.path.realpath(sys.executable), *options]


def _runs(words: list[str]) -> bool:
    try:
        return (
            subprocess.run(
                [*words, "--version"], capture_output=True, env=startpython.cleaned(), timeout=10
            ).returncode
            == 0
        )
    except (OSError, subprocess.TimeoutExpired):
        return False

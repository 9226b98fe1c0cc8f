"""`upcall-request-key`: what a line of request-key.conf runs, as root, once for each key that the kernel wants.

It is a C program (forward.c, decide.c, host.c), compiled when the package is built (build.py). Where that could not be
done, a stand-in in Python (standin.py) does the same. docs/request-key.md tells what both do.
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
    """The compiled program if it is there and runs on this machine, else the stand-in."""
    return PROGRAM if _runs([str(PROGRAM)]) else STANDIN


def command() -> list[str]:
    """The words for the line of request-key.conf, before its own `%k`; absolute."""
    found = program()
    return [str(found)] if found == PROGRAM else [*_interpreter(), str(found)]


def _interpreter() -> list[str]:
    """The system's Python rather than one that belongs to a user; without the environment and site-packages."""
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

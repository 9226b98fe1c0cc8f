"""The one place that builds a command line which starts Python.

As root it is always `-I`: no PYTHON* variables, no user site, no working directory. -I is not inherited: `python -I`
that starts `python -P` has lost it. An ordinary user's process hands on what it was started with, and -P in any case,
so that a daemon finds the plugins in PYTHONPATH or the user's own site if, and only if, its command did.

No variable of the environment has a say in it. Root who develops a plugin in PYTHONPATH says so on the command line,
by `python -X upcall-environment -m upcall ...`, which is handed on.
"""

from __future__ import annotations

import os
import sys
from typing import Final

# What the dynamic loader, the C library, OpenSSL and shells take code or paths from. Set-user-ID programs ignore most
# of these (ld.so(8), secure-execution mode); a process that root starts as root is no such program.
_HARMFUL: Final = (
    "LD_",
    "PYTHON",
    "GLIBC_",
    "MALLOC_",
    "OPENSSL_",
    "BASH_",
    "GCONV_PATH=",
    "GETCONF_DIR=",
    "HOSTALIASES=",
    "LOCPATH=",
    "NLSPATH=",
    "RESOLV_HOST_CONF=",
    "RES_OPTIONS=",
    "TZDIR=",
    "ENV=",
    "IFS=",
    "SSLKEYLOGFILE=",
)
_OPTION: Final = "upcall-environment"
PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def options(isolated: bool = False) -> list[str]:
    """The interpreter's options for a module of ours. `isolated`: -I, whoever starts it."""
    if isolated or sys.flags.isolated or _is_guarded():
        return ["-I"]
    kept = [(sys.flags.ignore_environment, "-E"), (sys.flags.no_user_site, "-s")]
    return [option for flag, option in kept if flag] + ["-P"] + (["-X", _OPTION] if _OPTION in sys._xoptions else [])


def command(module: str, *arguments: str, isolated: bool = False) -> list[str]:
    """The words that run `module` with this interpreter, whose path is the first of them."""
    return [sys.executable, *options(isolated), "-m", module, *arguments]


def cleaned() -> dict[str, str]:
    """Our environment for a process of ours; as root without what puts code into it, and with a fixed PATH."""
    if not _is_guarded():
        return dict(os.environ)
    return {name: value for name, value in os.environ.items() if not f"{name}=".startswith(_HARMFUL)} | {"PATH": PATH}


def _is_guarded() -> bool:
    """Whether the environment may be somebody else's doing."""
    return os.geteuid() == 0 and _OPTION not in sys._xoptions


def fixed(**more: str) -> dict[str, str]:
    """An environment with nothing of ours, for the system's own programs that root runs."""
    return {"PATH": PATH, "LANG": "C.UTF-8", **more}

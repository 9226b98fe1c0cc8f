"""Builds every command line that starts Python. No other module does.

For root it always has `-I`: no PYTHON* variables, no user site, no working directory. -I is not inherited: a `python
-P` that `python -I` starts does not have it. An ordinary user's process passes on its own options, and -P in any case:
so a daemon finds the plugins in PYTHONPATH or the user's site if, and only if, its command did.

No environment variable changes this. Root can develop a plugin in PYTHONPATH only by a command line, `python -X
upcall-environment -m upcall ...`, which is passed on.
"""

from __future__ import annotations

import os
import sys
from typing import Final

# Variables that give code or paths to the dynamic loader, the C library, OpenSSL and shells. Set-user-ID programs
# ignore most of them (ld.so(8), secure-execution mode); a process that root starts as root does not.
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
    """Returns the interpreter's options for one of our modules. `isolated`: -I also for users other than root."""
    if isolated or sys.flags.isolated or _is_guarded():
        return ["-I"]
    kept = [(sys.flags.ignore_environment, "-E"), (sys.flags.no_user_site, "-s")]
    return [option for flag, option in kept if flag] + ["-P"] + (["-X", _OPTION] if _OPTION in sys._xoptions else [])


def command(module: str, *arguments: str, isolated: bool = False) -> list[str]:
    """Returns the command line that runs `module` with this interpreter, whose path is its first word."""
    return [sys.executable, *options(isolated), "-m", module, *arguments]


def cleaned() -> dict[str, str]:
    """Returns this process's environment for a process of ours; for root without variables that inject code, and with
    a fixed PATH."""
    if not _is_guarded():
        return dict(os.environ)
    return {name: value for name, value in os.environ.items() if not f"{name}=".startswith(_HARMFUL)} | {"PATH": PATH}


def _is_guarded() -> bool:
    """Returns whether another user may have set the environment: this is root, without `-X upcall-environment`."""
    return os.geteuid() == 0 and _OPTION not in sys._xoptions


def fixed(**more: str) -> dict[str, str]:
    """Returns an environment with nothing of this process's, for the system's own programs that root runs."""
    return {"PATH": PATH, "LANG": "C.UTF-8", **more}

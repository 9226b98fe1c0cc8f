"""`python -m upcall.daemon.isolation FD MEMORY SPEC`: the process of one key module. Started by child.py only."""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
from typing import NoReturn

from upcall.daemon.isolation.serving import ModuleServer
from upcall.kernel import keyring
from upcall.kernel.process import die_with_parent, harden
from upcall.protocols.ecryptfs import own_files as ownfiles

DESCRIPTORS = 256


def run(fd: int, memory: int, spec: str) -> NoReturn:
    """Serves the key module `spec` on socket `fd`. `memory`: bytes of private memory (RLIMIT_DATA) above which
    allocations fail; 0: no limit."""
    die_with_parent(signal.SIGKILL)
    harden()
    _limit(resource.RLIMIT_NOFILE, DESCRIPTORS)
    if memory:
        _limit(resource.RLIMIT_DATA, memory)
    os.set_inheritable(fd, False)  # for programs that the module runs
    ownfiles.refuse(keyring, lambda *_, **__: None)  # no log: the daemon logs the error
    ModuleServer(socket.socket(fileno=fd), spec).run()


def _limit(what: int, value: int) -> None:
    _, hard = resource.getrlimit(what)
    bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(what, (bound, bound))


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])

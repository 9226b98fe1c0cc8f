"""A TPM in software (swtpm, libtpms), for tests and measurements. Everybody on the machine may talk to it."""

from __future__ import annotations

import contextlib
import errno
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Self

from upcall.core.errors import ModuleFailed
from upcall_tpm2.chip import library

_HOST = "127.0.0.1"
_PATIENCE = 60.0  # seconds for a process to begin or end
_TRIES = 20


def missing() -> str:
    """What to install before a SoftwareTpm can be used; empty if all is there."""
    try:
        library()
    except ModuleFailed as error:
        return str(error)
    return "" if shutil.which("swtpm") else "swtpm is missing: apt-get install swtpm libtss2-tcti-swtpm0"


class SoftwareTpm:
    """Its state is kept in `folder`, also over restarts, which are like reboots. Leaving the `with` block ends it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700, exist_ok=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0
        self.start()

    @property
    def tcti(self) -> str:
        return f"swtpm:host={_HOST},port={self._port}"

    @property
    def pid(self) -> int:
        return 0 if self._process is None else self._process.pid

    def start(self) -> None:
        """At the same ports as before; answers when this returns. OSError."""
        for _ in range(_TRIES):
            port = self._port or _two_free_ports()
            self._process = _run(self._folder, port)
            if _listens(port, self._process):
                self._port = port
                return
            self.kill()  # somebody else has taken one of the ports, or it cannot run at all
        raise OSError(errno.EADDRINUSE, f"swtpm does not run in {self._folder}")

    def restart(self) -> None:
        """A reboot: PCRs are as at the beginning."""
        self.shutdown()
        self.kill()
        self.start()

    def shutdown(self) -> None:
        """TPM2_Shutdown: without it, a TPM counts one wrong PIN more after a PIN was used."""
        tss = library()
        with tss.ESAPI(self.tcti) as esys:
            esys.shutdown(tss.TPM2_SU.CLEAR)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(_PATIENCE)
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def _run(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """It ends with us, however we end."""
    command = ["setpriv", "--pdeathsig", "KILL", "swtpm", "socket", "--tpm2", "--tpmstate", f"dir={folder}"]
    command += ["--server", f"type=tcp,port={port},bindaddr={_HOST}"]
    command += ["--ctrl", f"type=tcp,port={port + 1},bindaddr={_HOST}", "--flags", "not-need-init,startup-clear"]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def _listens(port: int, process: subprocess.Popen[bytes]) -> bool:
    """Waits until it does, or has ended."""
    deadline = time.monotonic() + _PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection((_HOST, port), _PATIENCE):
            return True
        time.sleep(0.005)
    return False


def _two_free_ports() -> int:
    """The first of two in a row: the library looks for the control channel at the port after the TPM's."""
    for _ in range(_TRIES):
        with socket.socket() as first, socket.socket() as second, contextlib.suppress(OSError, OverflowError):
            first.bind((_HOST, 0))
            second.bind((_HOST, first.getsockname()[1] + 1))
            return int(first.getsockname()[1])
    raise OSError(errno.EADDRINUSE, "no two free ports in a row")

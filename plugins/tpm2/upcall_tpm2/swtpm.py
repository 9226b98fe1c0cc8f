"""Runs a software TPM (swtpm, libtpms), for tests and measurements. Any local user can connect to it."""

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
_PATIENCE = 60.0  # seconds for a process to start or end
_TRIES = 20


def missing() -> str:
    """Returns what must be installed for `SoftwareTpm`; "" if nothing is missing."""
    try:
        library()
    except ModuleFailed as error:
        return str(error)
    return "" if shutil.which("swtpm") else "swtpm is missing: apt-get install swtpm libtss2-tcti-swtpm0"


class SoftwareTpm:
    """A swtpm process with its state in `folder`. A restart is like a reboot. A context manager: its end kills the
    process."""

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
        """Starts the process, on the same ports as before, and waits until it answers. OSError."""
        for _ in range(_TRIES):
            port = self._port or _two_free_ports()
            self._process = _run(self._folder, port)
            if _listens(port, self._process):
                self._port = port
                return
            self.kill()  # another process has taken one of the ports, or swtpm cannot run
        raise OSError(errno.EADDRINUSE, f"swtpm does not run in {self._folder}")

    def restart(self) -> None:
        """Simulates a reboot: resets the PCRs."""
        self.shutdown()
        self.kill()
        self.start()

    def shutdown(self) -> None:
        """Sends TPM2_Shutdown. Without it, a TPM counts one more wrong PIN after a PIN was used."""
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
    """Starts swtpm, which ends with this process (PR_SET_PDEATHSIG)."""
    command = ["setpriv", "--pdeathsig", "KILL", "swtpm", "socket", "--tpm2", "--tpmstate", f"dir={folder}"]
    command += ["--server", f"type=tcp,port={port},bindaddr={_HOST}"]
    command += ["--ctrl", f"type=tcp,port={port + 1},bindaddr={_HOST}", "--flags", "not-need-init,startup-clear"]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def _listens(port: int, process: subprocess.Popen[bytes]) -> bool:
    """Waits until the server listens. Returns False if its process has ended."""
    deadline = time.monotonic() + _PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection((_HOST, port), _PATIENCE):
            return True
        time.sleep(0.005)
    return False


def _two_free_ports() -> int:
    """Returns the first of two consecutive free ports: the library expects the control channel at the second."""
    for _ in range(_TRIES):
        with socket.socket() as first, socket.socket() as second, contextlib.suppress(OSError, OverflowError):
            first.bind((_HOST, 0))
            second.bind((_HOST, first.getsockname()[1] + 1))
            return int(first.getsockname()[1])
    raise OSError(errno.EADDRINUSE, "no two free ports in a row")

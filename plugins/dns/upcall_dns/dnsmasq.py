"""Runs a name server (dnsmasq) on the loopback, for tests and measurements. It answers from its options only."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Self

HOST = "127.0.0.1"
TTL = 120  # seconds, of records whose option has no TTL
_PATIENCE = 60.0  # seconds for the process to start or end
_TRIES = 20


def missing() -> str:
    """Returns what must be installed for `Dnsmasq`; "" if nothing is missing."""
    return "" if shutil.which("dnsmasq") else "dnsmasq is missing: apt-get install dnsmasq-base"


class Dnsmasq:
    """A dnsmasq process. A context manager: its end kills the process. `records`: options such as
    host-record=NAME,ADDRESS,TTL."""

    def __init__(self, folder: Path, *records: str, port: int = 0) -> None:
        self._folder, self._records = folder, records
        self._process: subprocess.Popen[bytes] | None = None
        self.port = port
        self._start()

    def _start(self) -> None:
        """Starts the process and waits until it answers. OSError."""
        for _ in range(_TRIES):
            port = self.port or _free_port()
            self._process = self._run(port)
            if _listens(port, self._process):
                self.port = port
                return
            self.kill()  # another process has taken the port, or dnsmasq cannot run
        raise OSError(errno.EADDRINUSE, f"dnsmasq does not run in {self._folder}")

    def _run(self, port: int) -> subprocess.Popen[bytes]:
        """Starts dnsmasq, which ends with this process (PR_SET_PDEATHSIG)."""
        command = ["setpriv", "--pdeathsig", "KILL", "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null"]
        command += [f"--port={port}", f"--listen-address={HOST}", "--bind-interfaces", "--pid-file"]
        command += ["--no-hosts", "--no-resolv", f"--local-ttl={TTL}", "--log-facility=-"]
        command += ["--user=root"] if os.geteuid() == 0 else []
        command += [f"--{record}" for record in self._records]
        with (self._folder / "dnsmasq.log").open("ab") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(_PATIENCE)
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def afsdb(cell: str, server: str, subtype: int = 1) -> str:
    """Returns the option for an AFSDB record, as raw bytes: dnsmasq has no syntax for it."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in server.split("."))
    return f"dns-rr={cell},18,{(subtype.to_bytes(2, 'big') + labels + bytes(1)).hex()}"


def _listens(port: int, process: subprocess.Popen[bytes]) -> bool:
    """Waits until the server listens. Returns False if its process has ended."""
    deadline = time.monotonic() + _PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection((HOST, port), _PATIENCE):
            return True
        time.sleep(0.005)
    return False


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])

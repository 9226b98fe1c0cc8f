"""`python -m bench.soak.broker FOLDER DEVICE`: runs the broker of a soak, with a simulated kernel: another process is
/dev/ecryptfs, over the socket DEVICE; request_key's keys are computed from their serial numbers."""

from __future__ import annotations

import functools
import os
import select
import signal
import socket
import struct
import sys
from pathlib import Path

from upcall.broker.server import Server
from upcall.broker.settings import configured
from upcall.kernel.process import harden, raise_descriptor_limit
from upcall.process.paths import own_place
from upcall.protocols.catalogue import SERVICES
from upcall.protocols.ecryptfs.packets import MAX_READ
from upcall.protocols.request_key import origin
from upcall.protocols.request_key.messages import Described
from upcall.testing.kernel import sources

UID = struct.Struct("=I")
AUTHORISATION = 1 << 30  # added to the serial of a key


def described(serial: int, pid: int) -> Described:
    """Returns the kernel's description of a key: alternately a name, and a session for the process `pid`."""
    if serial >= AUTHORISATION:
        return Described(".request_key_auth", 0, 0, 0x0B010000, b"%x" % (serial - AUTHORISATION))
    if serial % 2:
        return Described("dns_resolver", 0, 0, 0x39010000, b"host%d.test" % serial)
    words = f"ver=0x2;host=fs;ip4=127.0.0.1;sec=krb5;uid=0x0;creduid={os.geteuid():#x};pid={pid:#x}"
    return Described("cifs.spnego", 0, 0, 0x39010000, words.encode("ascii"))


class Keys:
    """Replaces upcall.protocols.request_key.origin, with simulated keys."""

    Process = staticmethod(origin.Process)
    started_at = staticmethod(origin.started_at)

    def key(self, serial: int, /) -> Described:
        return described(serial, os.getppid())

    def asked_by(self, _authorisation: int, /) -> int:
        return os.getppid()


class Device:
    """/dev/ecryptfs as opened by one uid: a connection whose datagrams are frames."""

    def __init__(self, uid: int, path: Path) -> None:
        self.uid = uid
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.connect(os.fspath(path))
        self._socket.send(UID.pack(uid))
        self.fd = self._socket.fileno()

    def fileno(self) -> int:
        return self.fd

    def readable(self) -> bool:
        return bool(select.select([self.fd], [], [], 0)[0])

    def read(self) -> bytes:
        return self._socket.recv(MAX_READ)

    def write(self, frame: bytes, /) -> None:
        self._socket.send(frame, socket.MSG_DONTWAIT)

    def close(self) -> None:
        if self.fd >= 0:
            self._socket.close()
            self.fd = -1


def main(folder: str, device: str) -> None:
    harden()
    raise_descriptor_limit()
    place = own_place(Path(folder))
    opens = functools.partial(Device, path=Path(device))
    read = functools.partial(configured, SERVICES)
    owners = {"dns_resolver": os.geteuid()}
    make = sources(place, opens, Keys(), owners)
    server = Server(place, make, read=lambda: read()._replace(owners=owners))
    server.heed_signals()
    signal.signal(signal.SIGHUP, server.reload)
    server.run()


if __name__ == "__main__":
    main(*sys.argv[1:])

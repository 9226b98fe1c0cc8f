"""Fuzzes /etc/hosts and resolv.conf: root's files, written by programs that receive names from the network.

Raises only Refused. Every result is a valid address as inet_ntop writes it.
"""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path

from upcall_dns import hosts, servers

from fuzz.target import holds, taken
from upcall.core.errors import Refused

SEEDS = [
    b"192.0.2.1 host.test alias # no\n::1 host.test\n1.2.3 host.test\n",
    b"nameserver 192.0.2.53\nsearch test a.test\noptions ndots:2 timeout:1\n",
    b"nameserver ::1%lo\noptions ndots:x\n",
    b"\xff host.test\n",
]
MEMORY = 4 << 20
_FOLDER = tempfile.TemporaryDirectory(prefix="upcall-fuzz-")
_FILE = Path(_FOLDER.name) / "file"


def run(data: bytes) -> None:
    _FILE.write_bytes(data)
    for address in hosts.look_up(_FILE, "host.test", (4, 6)):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        holds(socket.inet_ntop(family, hosts.packed(address)) == address, "no address")
    taken(servers.resolver, _FILE, 53, refuse=(Refused,))

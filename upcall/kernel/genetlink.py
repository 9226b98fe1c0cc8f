"""Listens to a multicast group of a generic netlink family.

pyroute2 can look up a family, and takes 110 ms and 10 MB to import. A long-running process must not keep that, so a
short-lived child does it (`python -m upcall.kernel.genetlink FAMILY GROUP`). Messages are then read from a plain
socket, which takes a twentieth of pyroute2's time per message.

Source: netlink(7), net/netlink/af_netlink.c, net/netlink/genetlink.c of Linux 6.1.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import struct
import subprocess
import sys
from typing import Final, NamedTuple

from upcall.core.errors import UsageError, error_words
from upcall.process import start_python as startpython

NETLINK_GENERIC: Final = 16
BUFFER: Final = 16 << 20  # bytes; the kernel doubles it, and charges 768 for a warning of 76: room for 43,000

_SOL_NETLINK = 270
_ADD_MEMBERSHIP, _LIST_MEMBERSHIPS = 1, 9
_SO_RCVBUFFORCE = 33
_LOOK_UP = 30.0  # seconds; a slow machine needs five
_DONTWAIT = int(socket.MSG_DONTWAIT)


class NoFamily(UsageError):
    """This kernel, or this network namespace, has no such family or group."""


class Ids(NamedTuple):
    """The numbers of a family and one of its groups, until the next boot."""

    family: int
    group: int


def look_up(family: str, group: str) -> Ids:
    """Looks up a family and group in a child process. Blocks up to 30 s. NoFamily; UsageError if the look-up
    failed."""
    command = startpython.command("upcall.kernel.genetlink", family, group)
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_LOOK_UP,
            stdin=subprocess.DEVNULL,
            env=startpython.cleaned(),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"cannot look up the generic netlink family {family}: {error_words(error)}") from error
    if done.returncode == os.EX_UNAVAILABLE:
        raise NoFamily(done.stdout.strip())
    found = re.fullmatch(r"(\d+) (\d+)\s*", done.stdout)
    if done.returncode != 0 or found is None:
        said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise UsageError(f"cannot look up the generic netlink family {family}: {said[0]}")
    return Ids(int(found[1]), int(found[2]))


def resolve(family: str, group: str) -> Ids:
    """Looks them up in this process, by importing pyroute2. NoFamily."""
    import logging

    from pyroute2.netlink import genlmsg  # type: ignore[import-untyped]
    from pyroute2.netlink.exceptions import NetlinkError  # type: ignore[import-untyped]
    from pyroute2.netlink.generic import GenericNetlinkSocket  # type: ignore[import-untyped]

    logging.disable()  # pyroute2 would log the error that is raised below
    try:
        with GenericNetlinkSocket() as asked:
            asked.bind(family, genlmsg)
            number, groups = asked.prid, asked.mcast_groups
    except NetlinkError as error:
        if error.code != errno.ENOENT:
            raise
        raise NoFamily(
            f"there is no generic netlink family {family} here: the kernel was built without it, "
            "or this is not the first network namespace"
        ) from None
    finally:
        logging.disable(logging.NOTSET)
    if group not in groups:
        raise NoFamily(f"the generic netlink family {family} has no group {group}")
    return Ids(number, groups[group])


class Listener:
    """A socket in one group. It recovers from an overflow by itself; the sequence numbers reveal the number of lost
    messages."""

    def __init__(
        self,
        group: int,
        buffer: int = BUFFER,
        protocol: int = NETLINK_GENERIC,
        sender: int = 0,
        made: socket.socket | None = None,
    ) -> None:
        """Joins the group. OSError; its text says so if the kernel refused.

        `sender`: the accepted portid; 0: the kernel. Tests pass another one, and no `group`, which ordinary users may
        not always join. `made`: a socket from `with_room`, made before the privileges were dropped.
        """
        self._sender = sender
        self.overflows = 0  # overflows of the buffer
        self.foreign = 0  # messages of other senders than the kernel; only root can send them
        self.socket = with_room(buffer, protocol) if made is None else made
        try:
            self.room = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)  # in the kernel's units
            self.socket.bind((0, 0))
            if group:
                self.socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
            if group and group not in memberships(self.socket):
                raise OSError(errno.ENOTCONN, f"the kernel did not take us into multicast group {group}")
        except OSError:
            self.socket.close()
            raise

    def fileno(self) -> int:
        return self.socket.fileno()

    def receive(self, most: int, size: int = 4096) -> list[bytes]:
        """Returns waiting datagrams, at most `most`, each truncated at `size` bytes. Does not block. OSError, except
        for an overflow, which is counted."""
        found: list[bytes] = []
        receive, take, sender = self.socket.recvfrom, found.append, self._sender
        try:
            for _ in range(most):
                data, (portid, _) = receive(size, _DONTWAIT)
                if portid == sender:
                    take(data)
                else:
                    self.foreign += 1
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            self.overflows += 1  # reported once, by the read after the loss; later messages are still there
        return found

    def close(self) -> None:
        self.socket.close()


def with_room(buffer: int = BUFFER, protocol: int = NETLINK_GENERIC) -> socket.socket:
    """Returns a socket with the largest receive buffer that this process may have. OSError."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, protocol)
    try:
        try:
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, buffer)
        except PermissionError:  # without CAP_NET_ADMIN the limit net.core.rmem_max applies
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    except OSError:
        sock.close()
        raise
    return sock


def memberships(sock: socket.socket) -> frozenset[int]:
    """Returns the groups of the socket as the kernel reports them (NETLINK_LIST_MEMBERSHIPS)."""
    data = sock.getsockopt(_SOL_NETLINK, _LIST_MEMBERSHIPS, 512)
    words = struct.unpack(f"={len(data) // 4}I", data[: len(data) & ~3])
    return frozenset(32 * word + bit + 1 for word, mask in enumerate(words) for bit in range(32) if mask & 1 << bit)


def main(arguments: list[str]) -> int:
    """`FAMILY GROUP`: prints both numbers, or why they do not exist. Returns the exit status."""
    try:
        found = resolve(*arguments)
    except NoFamily as error:
        print(error)  # noqa: T201
        return os.EX_UNAVAILABLE
    print(found.family, found.group)  # noqa: T201
    return os.EX_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

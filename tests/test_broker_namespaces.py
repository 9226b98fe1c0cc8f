"""Root of a user namespace, which every user can be: the broker treats it as its uid outside."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from upcall.core.errors import UsageError
from upcall.process.paths import Place
from upcall.protocols.ecryptfs.packets import Ask, pack_ask
from upcall.testing.played import PlayedDaemon, PlayedRequester
from upcall.testing.processes import PATIENCE, RunningBroker, in_child
from upcall.wire.envelope import HELO, pack_control

CLONE_NEWUSER, PR_SET_DUMPABLE = 0x10000000, 4
NOBODY = 65534
USER = NOBODY if os.geteuid() == 0 else os.geteuid()
PLEASE = pack_ask(Ask(0x40, "0123456789abcdef", b"wrapped"))
NONE = "none here"


def as_root_of_a_namespace(function: Callable[[], Any]) -> Any:
    """What the function says in a process that is uid 0, and has every capability, in a namespace of its own."""

    def inside() -> Any:
        gid = os.getegid()
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # after a change of uid /proc/self is root's
        if libc.unshare(CLONE_NEWUSER) != 0:
            return NONE
        for name, line in (("setgroups", "deny"), ("uid_map", f"0 {USER} 1"), ("gid_map", f"0 {gid} 1")):
            Path(f"/proc/self/{name}").write_text(line)
        assert os.geteuid() == 0
        return function()

    found = in_child(inside, uid=USER if os.geteuid() == 0 else None)
    if found == NONE:
        pytest.skip("this machine gives users no namespaces of their own")
    return found


class Requester(PlayedRequester):
    """It trusts a broker of any uid: in its namespace the real root has no uid."""

    def __init__(self, folder: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(str(Place(folder).socket))
        self._seq = 0


@pytest.mark.parametrize(("uid", "reason"), [(0, "not-permitted"), (USER, "no-daemon"), (USER + 1, "not-permitted")])
def test_namespace_root_may_ask_only_for_its_outside_uid(broker: RunningBroker, uid: int, reason: str) -> None:
    def ask() -> str:
        with Requester(broker.folder) as requester:
            requester.ask(PLEASE, uid=uid)
            return requester.reason()

    assert as_root_of_a_namespace(ask) == reason


def test_namespace_root_is_registered_under_its_outside_uid(broker: RunningBroker) -> None:
    """Its HELO is treated as any HELO of that user."""

    def register() -> bool:
        daemon = PlayedDaemon(broker.folder, register=False)
        daemon.connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        daemon.connection.connect(str(Place(broker.folder).registration_socket))
        daemon.connection.send(pack_control(HELO))
        daemon.helo_heard()
        return True

    assert as_root_of_a_namespace(register)
    broker.logged(f"daemon-registered uid={USER}")


def test_a_client_inside_a_namespace_trusts_no_broker(broker: RunningBroker) -> None:
    """The listener's uid is not mapped there: the client fails, and sends nothing."""
    if os.geteuid() == USER:
        pytest.skip("the broker is the user's own, who is in the namespace")

    def ask() -> str:
        try:
            PlayedRequester(broker.folder)
        except UsageError as error:
            return str(error)
        return "believed"

    assert "not one of" in as_root_of_a_namespace(ask)

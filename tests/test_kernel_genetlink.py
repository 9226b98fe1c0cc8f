"""Looking up a family, joining a group, and the error without permission."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys

import pytest

from upcall.core.errors import UsageError
from upcall.kernel import genetlink
from upcall.kernel.genetlink import Ids, Listener, NoFamily, look_up, memberships

USERSOCK = 2


def here() -> Ids:
    """VFS_DQUOT of this machine, or a reason to leave the test out."""
    try:
        return look_up("VFS_DQUOT", "events")
    except NoFamily as error:
        pytest.skip(str(error))


def test_the_netlink_controller_is_found_on_every_kernel() -> None:
    assert look_up("nlctrl", "notify") == Ids(16, 16)


def test_an_unknown_family_is_refused_by_name() -> None:
    with pytest.raises(NoFamily, match="no generic netlink family UPCALL_NONE here: the kernel was"):
        look_up("UPCALL_NONE", "events")


def test_an_unknown_group_is_refused_by_name() -> None:
    with pytest.raises(NoFamily, match="nlctrl has no group events"):
        look_up("nlctrl", "events")


def test_a_look_up_whose_child_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UsageError, match="exit code 1"):
        look_up("nlctrl", "notify")
    monkeypatch.setattr(sys, "executable", "/nowhere")
    with pytest.raises(UsageError, match="No such file"):
        look_up("nlctrl", "notify")


def test_a_look_up_whose_child_hangs_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(genetlink, "_LOOK_UP", 0.0)
    with pytest.raises(UsageError, match="timed out"):
        look_up("nlctrl", "notify")


def test_a_look_up_does_not_import_pyroute2_into_this_process() -> None:
    code = "import sys; from upcall.kernel.genetlink import look_up; look_up('nlctrl', 'notify'); "
    code += "sys.exit('pyroute2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_listener_joins_its_group_with_a_large_buffer() -> None:
    ids = here()
    listener = Listener(ids.group)
    assert memberships(listener.socket) == {ids.group}
    assert listener.receive(10) == []
    assert listener.room > 200_000
    listener.close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may join every group")
def test_joining_a_group_without_permission_is_an_error() -> None:
    with pytest.raises(PermissionError):
        Listener(5, protocol=USERSOCK)


def send(sender: socket.socket) -> None:
    with contextlib.suppress(ConnectionRefusedError):  # after the group it tries portid 0, which nobody has
        sender.sendto(bytes(76), (0, 1 << 28))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may join and send there")
def test_an_overflow_is_counted_once_and_later_messages_are_received() -> None:
    sender = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, USERSOCK)
    sender.bind((0, 0))
    listener = Listener(29, 4096, USERSOCK, sender.getsockname()[0])
    for _ in range(100):
        send(sender)
    assert listener.receive(10) == []
    assert listener.overflows == 1
    assert 0 < len(listener.receive(100)) < 100
    assert listener.receive(10) == []
    assert listener.overflows == 1
    send(sender)
    assert listener.receive(10) == [bytes(76)]
    listener.close()
    sender.close()

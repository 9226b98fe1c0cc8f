"""Looking a family up, joining a group, and what a listener says when it may not."""

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


def test_every_kernel_has_the_controller() -> None:
    assert look_up("nlctrl", "notify") == Ids(16, 16)


def test_no_such_family() -> None:
    with pytest.raises(NoFamily, match="no generic netlink family UPCALL_NONE here: the kernel was"):
        look_up("UPCALL_NONE", "events")


def test_no_such_group() -> None:
    with pytest.raises(NoFamily, match="nlctrl has no group events"):
        look_up("nlctrl", "events")


def test_a_child_that_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UsageError, match="exit code 1"):
        look_up("nlctrl", "notify")
    monkeypatch.setattr(sys, "executable", "/nowhere")
    with pytest.raises(UsageError, match="No such file"):
        look_up("nlctrl", "notify")


def test_a_child_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(genetlink, "_LOOK_UP", 0.0)
    with pytest.raises(UsageError, match="timed out"):
        look_up("nlctrl", "notify")


def test_this_process_does_not_pay_for_pyroute2() -> None:
    code = "import sys; from upcall.kernel.genetlink import look_up; look_up('nlctrl', 'notify'); "
    code += "sys.exit('pyroute2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == 0


def test_a_listener_is_in_its_group() -> None:
    ids = here()
    listener = Listener(ids.group)
    assert memberships(listener.socket) == {ids.group}
    assert listener.receive(10) == []
    assert listener.room > 200_000
    listener.close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may join every group")
def test_a_group_that_one_may_not_join() -> None:
    with pytest.raises(PermissionError):
        Listener(5, protocol=USERSOCK)


def send(sender: socket.socket) -> None:
    with contextlib.suppress(ConnectionRefusedError):  # after the group it tries portid 0, which nobody has
        sender.sendto(bytes(76), (0, 1 << 28))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may join and send there")
def test_overflow_heals() -> None:
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

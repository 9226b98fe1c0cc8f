"""Child processes of broker and daemon inherit their dropped privileges, and still work."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.test_prompting_pinentry import OnTerminal
from upcall.daemon.plugins import Discovered, Overrides
from upcall.daemon.reload import find_in_child
from upcall.kernel import genetlink, process, seccomp
from upcall.kernel.genetlink import NoFamily
from upcall.keys.passphrase import fetch_from_keyring
from upcall.process import hardening
from upcall.process.settings import dumps, loads
from upcall.testing.processes import PATIENCE, in_child

BACKEND = """
import os
from keyring.backend import KeyringBackend

class Backend(KeyringBackend):
    priority = 1
    def get_password(self, service, username):
        status = open("/proc/self/status").read()
        assert "Seccomp:\\t2" in status and "NoNewPrivs:\\t1" in status, status
        return "word of " + username
    def set_password(self, service, username, password): ...
    def delete_password(self, service, username): ...
"""

pytestmark = pytest.mark.skipif(bool(seccomp.why_not()), reason=f"seccomp: {seccomp.why_not()}")


def in_daemon(act: Callable[[], object]) -> Any:
    """What comes of it in a process that has given up what daemons do."""

    def work() -> object:
        process.harden()
        assert hardening.of_daemon(hardening.DaemonHardening(), "no", None).seccomp == "yes"
        return act()

    return in_child(work, timeout=4 * PATIENCE)


def test_plugin_discovery_works_in_a_hardened_daemon() -> None:
    found = in_daemon(lambda: dumps(find_in_child(Overrides())))
    assert "openssl" in [module.alias for module in loads(Discovered, found).plugins.modules]


def test_the_keyring_library_answers_a_hardened_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "python_keyring").mkdir()
    told = f"[backend]\ndefault-keyring=ours.Backend\nkeyring-path={tmp_path}\n"
    (tmp_path / "python_keyring" / "keyringrc.cfg").write_text(told)
    (tmp_path / "ours.py").write_text(BACKEND)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert in_daemon(lambda: fetch_from_keyring("ada", 2 * PATIENCE).decode()) == "word of ada"


@pytest.mark.parametrize("program", ["pinentry-tty", "pinentry-curses"])
def test_a_real_pinentry_works_in_a_hardened_daemon(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed (Debian: {program})")

    def asked() -> str:
        there = OnTerminal(program)
        there.expect(b"PIN:")
        there.type(b"271828\r")
        return there.answer.result(PATIENCE).decode()

    assert in_daemon(asked) == "271828"


def test_a_hardened_quota_source_can_look_up_the_netlink_family(tmp_path: Path) -> None:
    def looked_up() -> str:
        process.harden()
        hardening.of_quota_source(tmp_path / "quota.json")
        try:
            genetlink.look_up("VFS_DQUOT", "events")
        except NoFamily:
            return "it has asked, and there is none"
        return "found"

    assert in_child(looked_up, timeout=4 * PATIENCE) in ("found", "it has asked, and there is none")


@pytest.mark.parametrize("command", [["systemctl", "x"], None])
def test_a_hardened_broker_can_kill_the_commands_that_it_started(command: list[str] | None, tmp_path: Path) -> None:
    """A start command that hangs is killed with its children: signals to children stay allowed."""

    def ended() -> int:
        process.harden()
        hardening.of_broker(tmp_path, start=command)
        pid = os.posix_spawnp("sleep", ["sleep", "60"], dict(os.environ), setpgroup=0)
        os.killpg(pid, 9)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert in_child(ended) == -9

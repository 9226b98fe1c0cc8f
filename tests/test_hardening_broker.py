"""Privilege dropping in brokers and the quota source: what is forbidden, and what their sources keep."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import escaping
from tests.test_hardening import ABI, ROOT, confined, status_of
from upcall.broker.settings import Configured
from upcall.kernel import capabilities, process, seccomp
from upcall.process import hardening
from upcall.protocols.catalogue import SERVICES
from upcall.testing.processes import RunningBroker, RunningDaemon, in_child

pytestmark = pytest.mark.skipif(bool(seccomp.why_not()), reason=f"seccomp: {seccomp.why_not()}")


def test_every_thread_of_broker_and_daemon_has_the_seccomp_filter(
    broker: RunningBroker, daemon: RunningDaemon
) -> None:
    for pid in (broker.pid, daemon.pid):
        threads = [path.name for path in Path(f"/proc/{pid}/task").iterdir()]
        assert len(threads) > 1
        assert {status_of(int(thread))["Seccomp"] for thread in threads} == {"2"}


KEPT = [
    ({}, ""),
    ({"device": Path("/dev/ecryptfs")}, "SETUID"),
    ({"device": Path("/dev/ecryptfs"), "start": ["systemctl"]}, "SETUID"),
]


@pytest.mark.skipif(not ROOT, reason="only root has any")
@pytest.mark.parametrize(("options", "kept"), KEPT)
def test_a_broker_keeps_only_the_capabilities_that_its_sources_need(
    options: dict[str, Any], kept: str, tmp_path: Path
) -> None:
    """The table in docs/operations.md lists them."""

    def tried() -> list[str]:
        process.harden()
        process.stay_in_memory()
        said = hardening.of_broker(tmp_path, **options).capabilities
        return [said, ",".join(sorted(capabilities.effective()))]

    before = capabilities.effective()
    said, found = in_child(tried)
    wanted = set(filter(None, kept.split(",")))
    if "device" in options and "SYS_RESOURCE" not in before:
        wanted.add("IPC_LOCK")  # the limit could not be raised
    assert set(filter(None, found.split(","))) == wanted & before
    assert said == (found or "none")


def _in_broker(tmp_path: Path, acts: Callable[[], dict[str, str]], **options: Any) -> dict[str, str]:
    return _hardened(lambda: hardening.of_broker(tmp_path, **options), acts)


def _hardened(harden: Callable[[], object], acts: Callable[[], dict[str, str]]) -> dict[str, str]:
    def tried() -> dict[str, str]:
        process.harden()
        harden()
        return acts()

    found: dict[str, str] = in_child(tried)
    return found


def _of_broker(folder: Path) -> object:
    return hardening.of_broker(folder)


def _of_quota_source(folder: Path) -> object:
    return hardening.of_quota_source(folder / "quota.json")


@confined
def test_a_broker_cannot_do_what_hardening_forbids(
    tmp_path: Path, closed_home: Path, neighbour: int, open_port: int
) -> None:
    _cannot(_of_broker, tmp_path, closed_home, neighbour, open_port)


@confined
def test_a_quota_source_cannot_do_what_hardening_forbids(
    tmp_path: Path, closed_home: Path, neighbour: int, open_port: int
) -> None:
    _cannot(_of_quota_source, tmp_path, closed_home, neighbour, open_port)


def _cannot(
    harden: Callable[[Path], object], tmp_path: Path, closed_home: Path, neighbour: int, open_port: int
) -> None:
    """Only its folder can be written to, only programs that it has not written can be run; and little else."""
    ours = tmp_path / "ours"
    ours.mkdir()
    program = ours / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)

    def run(path: Path) -> Callable[[], object]:
        return lambda: subprocess.run([path], check=True, timeout=60, stdin=subprocess.DEVNULL)

    def acts() -> dict[str, str]:
        told = {name: escaping.outcome(act) for name, act in escaping.forbidden(closed_home, neighbour).items()}
        told |= {
            "write to /tmp": escaping.outcome((tmp_path / "beside").touch),
            "talk to the network": escaping.outcome(lambda: socket.create_connection(("127.0.0.1", open_port), 5)),
            "run what it has written": escaping.outcome(run(program)),
            "signal": escaping.outcome(lambda: os.kill(neighbour, 0)) if ABI >= 6 else "EPERM",
        }
        works = {
            "its folder": escaping.outcome(lambda: escaping._worked_in(ours)),
            "programs": escaping.outcome(run(Path("/bin/true"))),
            "python": escaping.outcome(run(Path(sys.executable))),
        }
        return {**told, **{f"works: {name}": said for name, said in works.items()}}

    found = _hardened(lambda: harden(ours), acts)
    if harden is _of_quota_source and ROOT:
        assert found.pop("quotas") not in ("EPERM", "EACCES")
    done = {name: found.pop(name) for name in tuple(found) if name.startswith("works: ")}
    assert set(done.values()) == {"done"}, done
    assert found.pop("talk to the network") == "EAFNOSUPPORT"
    assert not {name: said for name, said in found.items() if said not in ("EPERM", "EACCES")}


@pytest.mark.skipif(not ROOT, reason="only root may be asked for others")
def test_a_broker_of_all_sources_keeps_what_its_device_needs(tmp_path: Path) -> None:
    def acts() -> dict[str, str]:
        return {
            "device": escaping.outcome(lambda: escaping._by_name("setresuid", -1, -1, -1)),
            "quota": escaping.outcome(lambda: escaping._by_name("quotactl_fd", -1, 0, 0)),
            "family": escaping.outcome(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, seccomp.GENERIC)),
            "batch": escaping.outcome(lambda: os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))),
        }

    found = _in_broker(tmp_path, acts, device=Path("/dev/ecryptfs"))
    assert found == {"device": "done", "quota": "EPERM", "family": "EPROTONOSUPPORT", "batch": "done"}


@pytest.mark.skipif(not ROOT, reason="only root hears of quotas")
def test_a_quota_source_keeps_quotactl_and_generic_netlink_only(tmp_path: Path) -> None:
    def acts() -> dict[str, str]:
        def made(protocol: int) -> Callable[[], object]:
            return lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)

        return {
            "quota": escaping.outcome(lambda: escaping._by_name("quotactl_fd", -1, 0, 0)),
            "family": escaping.outcome(made(seccomp.GENERIC)),
            "links": escaping.outcome(made(seccomp.USERSOCK)),
            "uid": escaping.outcome(lambda: escaping._by_name("setresuid", -1, -1, -1)),
            "listen": escaping.outcome(lambda: socket.socket(socket.AF_UNIX).listen()),
            "capabilities": ",".join(sorted(capabilities.effective())),
        }

    before = capabilities.effective()
    found = _hardened(lambda: _of_quota_source(tmp_path), acts)
    assert found == {
        "quota": found["quota"],
        "family": "done",
        "links": "EPROTONOSUPPORT",
        "uid": "EPERM",
        "listen": "EPERM",
        "capabilities": ",".join({"SYS_ADMIN"} & before),
    }
    assert found["quota"] not in ("EPERM", "EACCES")


@pytest.mark.parametrize(
    ("absent", "start", "command"),
    [
        ("refuse", ["sh"], None),
        ("start", ["systemctl", "x"], ["systemctl", "x"]),
        ("start", ["sh", "x"], ["sh", "x"]),
    ],
)
def test_only_a_start_command_other_than_systemctl_hands_on_hardening(
    absent: str, start: Sequence[str], command: Sequence[str] | None
) -> None:
    services = {"cifs.spnego": SERVICES["cifs.spnego"]._replace(absent=absent)}
    assert Configured(services, {}, start).command == command
    assert hardening.hands_on(start) == (start[0] != "systemctl")


@confined
def test_a_start_command_inherits_no_restriction_that_would_stop_a_daemon(tmp_path: Path, open_port: int) -> None:
    def acts() -> dict[str, str]:
        return {
            "write": escaping.outcome((tmp_path / "daemon.sock").touch),
            "bind": escaping.outcome(lambda: escaping._bound(0)),
            "talk to the network": escaping.outcome(
                lambda: socket.create_connection(("127.0.0.1", open_port), 5).close()
            ),
            "become": escaping.outcome(lambda: os.setresuid(os.getuid(), os.getuid(), os.getuid())),
        }

    folder = tmp_path / "broker"
    folder.mkdir()
    assert set(_in_broker(folder, acts, start=["sh", "-c", "x"]).values()) == {"done"}


def test_a_restricted_broker_ignores_a_start_command_set_by_reload(folder: Path) -> None:
    system = folder.parent / "config.toml"
    system.write_text("")
    with RunningBroker(folder, system=system) as broker:
        system.write_text(
            '[request-key."cifs.spnego"]\nwithout-daemon = "start"\n[daemon]\nstart = ["sh", "-c", "x"]\n'
        )
        broker.signal(1)
        broker.logged("start-command-ignored")
        assert broker.status()["broker"]["hardening"]["seccomp"] == "yes"


def test_the_configuration_can_turn_the_brokers_hardening_off(folder: Path) -> None:
    system = folder.parent / "config.toml"
    system.write_text("[hardening]\nbroker = false\n")
    with RunningBroker(folder, system=system) as broker:
        said = broker.status()["broker"]["hardening"]
        assert said["seccomp"] == said["landlock"] == f"no: {hardening.OFF}"
        assert status_of(broker.pid)["NoNewPrivs"] == "1"
        seen = status_of(broker.pid)["Seccomp"]
        assert seen == status_of(os.getpid())["Seccomp"]

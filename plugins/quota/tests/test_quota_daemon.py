"""From a broker that gives notice, over real netlink, through a real daemon, to a real terminal and a real server."""

from __future__ import annotations

import json
import os
import pty
import select
import tempfile
import threading
import time
import tty
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from upcall_quota.played import serve_once, stall

from upcall.core.messages import Requester
from upcall.core.router import Router
from upcall.daemon.plugins import Plugins, ServiceHandler
from upcall.daemon.settings import DaemonSettings
from upcall.protocols.catalogue import SERVICES
from upcall.protocols.quota.notice import Cause, QuotaNotice, Subject, pack
from upcall.testing.notices import hostile, notice
from upcall.testing.played import PlayedBroker
from upcall.testing.processes import NotInTime, RunningDaemon, until
from upcall.wire.envelope import NOTICE

UID = os.geteuid()
LAZY = DaemonSettings(plugins=Plugins(handlers=(ServiceHandler("quota", "upcall_quota:handler"),)))


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short name: the path of a socket has 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="upcall-") as name:
        yield Path(name)


@pytest.fixture
def terminal() -> Iterator[int]:
    """The master's side of a terminal of ours that takes messages."""
    master, slave = pty.openpty()
    path = Path(os.ttyname(slave))
    try:
        os.chown(path, UID, 5)
        path.chmod(0o620)
    except PermissionError:
        pytest.skip("/dev/pts is mounted without gid=5, and we are not root")
    tty.setraw(slave)
    yield master
    for fd in (master, slave):
        os.close(fd)


class Hook(BaseHTTPRequestHandler):
    got: list[dict[str, Any]] = []

    def do_POST(self) -> None:
        self.got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def hook() -> Iterator[str]:
    Hook.got = []
    with HTTPServer(("127.0.0.1", 0), Hook) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join(60)


class Told:
    """A daemon of this user with the plugin, set up by `settings`; and the broker that it is registered with."""

    def __init__(self, folder: Path, settings: str) -> None:
        file = folder / "home" / "upcall" / "config.toml"
        file.parent.mkdir(parents=True, mode=0o700)
        file.write_text(settings)
        file.chmod(0o600)
        self.broker = PlayedBroker(folder / "broker")
        surroundings = {"XDG_CONFIG_HOME": str(folder / "home")}
        self.daemon = RunningDaemon(folder / "broker", folder / "keys", {}, settings=LAZY, environment=surroundings)
        self.broker.register()

    def tell(self, told: QuotaNotice) -> None:
        self.broker.ask(0, pack(told), "quota", kind=NOTICE)


def settings(*names: str, more: str = "") -> str:
    """For whichever of the two kinds of daemon we can start."""
    return f"[quota]\n{'system-sinks' if UID == 0 else 'sinks'} = {json.dumps(names)}\n{more}"


def shown(terminal: int) -> bytes:
    """Whole lines; there is an empty one before each."""
    text = b""
    while len(text) <= 2 or not text.endswith(b"\r\n"):
        if not select.select([terminal], [], [], 60)[0]:
            raise NotInTime(f"only {text!r} on the terminal")
        text += os.read(terminal, 65536)
    return text


def test_a_terminal_shows_what_the_broker_tells(folder: Path, terminal: int) -> None:
    told = Told(folder, settings("terminal"))
    with told.daemon:
        told.tell(notice(UID, "me"))
        text = shown(terminal)
        assert b"Quota used up: " in text
        assert b"on /home take up 10 GiB, the limit is 10 GiB: nothing more can be written." in text
        told.tell(hostile(UID))
        line = shown(terminal)[2:-2].decode("ascii")
        assert line.isprintable()
        told.tell(notice(UID, "me", event="below", used=5 << 30))
        assert b"Quota in order again: " in shown(terminal)


def test_a_notice_from_the_router_reaches_the_registered_uid_only(folder: Path, terminal: int) -> None:
    """The router refuses notices for other uids."""
    told = Told(folder, settings("terminal"))
    with told.daemon:
        core = Router(SERVICES, lambda *_, **__: None, random_u32=lambda: 0)
        core.helo(UID, told.daemon.pid, told.broker.portid, told.broker.socket, time.monotonic())
        assert core.notice(UID + 1, "quota", Requester(0, 0), pack(notice(UID + 1, "you"))) == "no-daemon"
        assert core.notice(UID, "quota", Requester(UID, 0), pack(notice(UID, "me", event="over-soft"))) == ""
        assert b"Quota exceeded: " in shown(terminal)


def test_a_sink_that_hangs_delays_neither_other_sinks_nor_requests(folder: Path, terminal: int) -> None:
    stalled = f'[quota.webhook]\nurl = "http://127.0.0.1:{serve_once(stall)}/"\n'
    told = Told(folder, settings("webhook", "terminal", more=stalled))
    with told.daemon:
        for number in range(20):
            told.tell(notice(UID, "me", used=number, filesystem=notice().filesystem._replace(device=str(number))))
        lines = b""
        while lines.count(b"Quota used up") < 20:
            lines += shown(terminal)
        told.broker.ask(7, b"", "quota")
        assert told.broker.response().seq == 7


def test_a_notice_is_posted_to_the_webhook(folder: Path, hook: str) -> None:
    told = Told(folder, settings("webhook", more=f'[quota.webhook]\nurl = "{hook}"\n'))
    with told.daemon:
        told.tell(notice(UID, "me"))
        until(lambda: len(Hook.got) == 1, "a POST")
        assert Hook.got[0]["subject"] == {"kind": "user", "id": UID, "name": "me"}


def test_a_bad_configuration_is_logged_by_file_and_line(folder: Path) -> None:
    told = Told(folder, "[quota]\nsinkz = []\n")
    with told.daemon:
        told.tell(notice(UID, "me"))
        told.daemon.logged(f"{folder}/home/upcall/config.toml:2: quota.sinkz: unknown")


def test_malformed_notices_and_those_for_others_are_logged(folder: Path) -> None:
    told = Told(folder, settings("log"))
    with told.daemon:
        told.broker.ask(0, b"{}", "quota", kind=NOTICE)
        told.daemon.logged("quota notice")
        if UID:
            told.tell(notice(UID + 1, subject=Subject("user", UID + 1, "you"), cause=Cause()))
            told.daemon.logged(f"is about uid {UID + 1}")

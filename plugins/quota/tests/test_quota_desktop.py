"""A real session bus with a real notification server on it, on a screen that nobody sees; and buses that misbehave."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from jeepney import HeaderFields, MatchRule, message_bus, new_error
from jeepney.io.blocking import Proxy, open_dbus_connection
from upcall_quota import bus as buses
from upcall_quota.bus import session_buses, system_buses
from upcall_quota.desktop import Desktop
from upcall_quota.privatebus import Desktop as Screen
from upcall_quota.privatebus import desktop, lacking
from upcall_quota.privatebus import message_bus as running_bus
from upcall_quota.systembus import Signal
from upcall_quota.systembus import sink as signal_sink

from upcall.core.errors import ModuleFailed
from upcall.protocols.quota.notice import Cause, Filesystem, Raw, sentence
from upcall.sink import TryLater
from upcall.testing.notices import hostile, notice
from upcall.testing.processes import PATIENCE, in_time, until

NO_BUS = lacking("dbus-daemon")
NO_DESKTOP = lacking("dbus-daemon", "Xvfb", "dunst")

pytestmark = pytest.mark.skipif(bool(NO_BUS), reason=NO_BUS or "-")


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[str]:
    with running_bus(tmp_path) as path:
        yield path


@pytest.fixture
def screen(tmp_path: Path, bus: str) -> Iterator[Screen]:
    if NO_DESKTOP:
        pytest.skip(NO_DESKTOP)
    with desktop(tmp_path, bus) as shown:
        yield shown


@pytest.fixture
def mine(bus: str) -> Iterator[Desktop]:
    made = Desktop(lambda: iter([bus]))
    yield made
    made.close()


def closed(screen: Screen, count: int) -> list[dict[str, object]]:
    """The bubbles, after all are closed."""
    until(lambda: screen.displayed() == count, f"{count} bubbles")
    screen.close_all()
    until(lambda: screen.displayed() == 0, "no bubble")
    return screen.history()


def test_a_notice_is_a_bubble_that_stays(screen: Screen, mine: Desktop) -> None:
    told = notice()
    mine.tell(told, sentence(told, told.at, 5001))
    (bubble,) = closed(screen, 1)
    assert bubble["appname"] == "upcall"
    assert bubble["summary"] == "Quota used up"
    assert str(bubble["body"]).startswith("Your files on /home take up 10 GiB, the limit is 10 GiB: nothing more")
    assert bubble["category"] == "device.error"
    assert bubble["timeout"] == 0, "it stays until somebody has seen it"


def test_each_quota_has_one_bubble_which_is_replaced(screen: Screen, mine: Desktop) -> None:
    mine.tell(notice(event="near"), "near")
    mine.tell(notice(event="over-hard"), "over")
    mine.tell(notice(filesystem=Filesystem("/srv", "/dev/vdb", "xfs")), "elsewhere")
    until(lambda: screen.displayed() == 2, "two bubbles")
    mine.tell(notice(event="below"), "in order")
    bubbles = closed(screen, 2)
    assert {(bubble["body"], bubble["timeout"]) for bubble in bubbles} == {
        ("elsewhere", 0),
        ("in order", 10_000_000),  # us
    }


def test_markup_in_names_is_shown_as_text(screen: Screen, mine: Desktop) -> None:
    told = hostile()
    mine.tell(told, sentence(told, told.at))
    mine.tell(notice(), "a <b>bold</b> name & <img src='x'>")
    bodies = [str(bubble["body"]) for bubble in closed(screen, 2)]
    assert any("a &lt;b&gt;bold&lt;/b&gt; name &amp; &lt;img src='x'&gt;" in body for body in bodies)
    assert not any("<b>" in body for body in bodies)
    assert all(body.isprintable() for body in bodies)


def test_a_restarted_notification_server_is_found(tmp_path: Path, bus: str, mine: Desktop) -> None:
    if NO_DESKTOP:
        pytest.skip(NO_DESKTOP)
    for text in ("one", "two"):
        with desktop(tmp_path, bus) as screen:
            mine.tell(notice(), text)
            (bubble,) = closed(screen, 1)
            assert bubble["body"] == text


def test_a_bus_without_a_notification_server_is_tried_later(mine: Desktop) -> None:
    with pytest.raises(TryLater, match="nobody shows notifications on the session bus"):
        mine.tell(notice(), "text")


def test_a_restarted_bus_is_found(tmp_path: Path) -> None:
    mine = Desktop(lambda: iter([str(tmp_path / "bus")]))
    with pytest.raises(TryLater, match=r"no message bus: .*bus: No such file"):
        mine.tell(notice(), "text")
    for _ in range(2):
        with running_bus(tmp_path), pytest.raises(TryLater, match="nobody shows notifications"):
            mine.tell(notice(), "text")
        (tmp_path / "bus").unlink(missing_ok=True)


class Misbehaving:
    """A bus that says this on each connection, and keeps it open."""

    def __init__(self, path: Path, *says: bytes) -> None:
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(path))
        self.listener.listen()
        self._says, self._kept = says, list[socket.socket]()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            while True:
                connection, _ = self.listener.accept()
                self._kept.append(connection)
                for words in self._says:
                    connection.recv(4096)
                    connection.sendall(words)
        except OSError:
            pass


OK = b"OK 0123456789abcdef0123456789abcdef\r\n"


@pytest.mark.parametrize(
    "says",
    [(), (b"", OK), (b"", OK, b"\xff" * 64), (b"", b"REJECTED\r\n"), (b"", OK, b"l\x02\x01\x01\xff\xff\xff\x7f" * 4)],
    ids=["silent", "no hello", "rubbish", "rejected", "endless"],
)
def test_a_bus_that_misbehaves_is_given_up_and_tried_later(
    tmp_path: Path, says: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buses, "PATIENCE", 0.5)
    misbehaving = Misbehaving(tmp_path / "bus", *says)
    mine = Desktop(lambda: iter([str(tmp_path / "bus")]))
    with misbehaving.listener, pytest.raises(TryLater, match="no message bus"):
        in_time(lambda: mine.tell(notice(), "text"), "its end")


def test_addresses_of_buses_come_from_the_environment_or_are_the_default() -> None:
    there = {
        "DBUS_SESSION_BUS_ADDRESS": "unix:abstract=/tmp/x,guid=1;unix:path=/run/%41",
        "XDG_RUNTIME_DIR": "/run/me",
    }
    always = f"/run/user/{os.geteuid()}/bus"
    assert list(session_buses(there)) == ["\0/tmp/x", "/run/A", "/run/me/bus", always]
    for wrong in ("", "nonsense", "unix:", "tcp:host=localhost,port=1", "unix:path"):
        assert list(session_buses({"DBUS_SESSION_BUS_ADDRESS": wrong})) == [always]
    assert list(system_buses({})) == ["/run/dbus/system_bus_socket"]
    assert list(system_buses({"DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/x"})) == ["/x"]


def test_the_signal_of_quota_nld_is_sent_for_warnings_of_the_kernel(bus: str) -> None:
    """Another connection to the bus hears it, as programs that listen to quota_nld do."""
    rule = MatchRule(type="signal", interface="com.system.quota.warning", member="warning", path="/")
    told = Signal(lambda: iter([bus]))
    with open_dbus_connection(f"unix:path={bus}") as listener:
        Proxy(message_bus, listener, timeout=PATIENCE).AddMatch(rule)
        with listener.filter(rule, bufsize=4) as heard:
            told.tell(notice(raw=None), "not of the kernel")
            told.tell(notice(raw=Raw(0, 4, 254, 3)), "text")
            signal = listener.recv_until_filtered(heard, timeout=PATIENCE)
            assert signal.header.fields[HeaderFields.signature] == "utuuut"
            assert signal.body == (0, 5001, 4, 254, 3, 5001)
            told.tell(notice(raw=Raw(2, 1, 8, 1), cause=Cause()), "text")
            assert listener.recv_until_filtered(heard, timeout=PATIENCE).body == (2, 5001, 1, 8, 1, 0)


def test_without_a_system_bus_the_signal_is_tried_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/none")
    with pytest.raises(TryLater, match="no message bus"):
        signal_sink.open({}).tell(notice(event="test", raw=None), "a test shows whether there is a bus")


def test_a_notification_server_that_refuses_is_not_tried_again(bus: str) -> None:
    """Another program owns the name, and answers with an error."""
    with open_dbus_connection(f"unix:path={bus}") as rude:
        Proxy(message_bus, rude, timeout=PATIENCE).RequestName("org.freedesktop.Notifications")

        def refuse() -> None:
            while True:
                asked = rude.receive(timeout=PATIENCE)
                if asked.header.fields.get(HeaderFields.member) == "GetCapabilities":
                    rude.send(new_error(asked, "org.example.Rude"))
                    return

        thread = threading.Thread(target=refuse, daemon=True)
        thread.start()
        with pytest.raises(ModuleFailed, match=r"the notification server refuses: org.example.Rude") as caught:
            Desktop(lambda: iter([bus])).tell(notice(), "text")
        assert not isinstance(caught.value, TryLater)
        thread.join(PATIENCE)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionResetError(), "it closed the connection"),  # as jeepney raises it at end of file
        (TimeoutError(), "no reply in time"),
        (FileNotFoundError(2, "No such file or directory"), "No such file or directory"),
    ],
)
def test_an_error_of_the_bus_is_told_in_words(error: OSError, said: str) -> None:
    assert buses.words(error) == said

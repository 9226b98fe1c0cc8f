"""The handler: which users it tells, and sinks that hang, fail and break beside one that works."""

from __future__ import annotations

import functools
import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from upcall_quota import QuotaHandler, sinks
from upcall_quota import delivery as delivering
from upcall_quota.delivery import Delivery
from upcall_quota.sinks import Opener

from upcall import config
from upcall.cli import main
from upcall.config import ConfigError
from upcall.core.errors import ModuleFailed, PeerError, Refused, UsageError
from upcall.core.messages import Requester
from upcall.handler import Notified
from upcall.keys import plugins as modules
from upcall.process.log import EventLog
from upcall.protocols.quota.notice import Cause, QuotaNotice, Subject, pack
from upcall.sink import Sink, SinkModule, TryLater
from upcall.testing.handlercontract import HandlerContract
from upcall.testing.notices import notice
from upcall.testing.processes import PATIENCE, in_time, until
from upcall.wire.envelope import Envelope

ALICE, BOB = 5001, 5002


class Noted:
    """A sink that remembers what it was told."""

    def __init__(self, *failures: BaseException) -> None:
        self.told: Queue[tuple[QuotaNotice, str]] = Queue()
        self._failures = list(failures)

    def tell(self, notice: QuotaNotice, text: str, /) -> None:
        if self._failures:
            raise self._failures.pop(0)
        self.told.put((notice, text))

    def next(self) -> tuple[QuotaNotice, str]:
        return self.told.get(timeout=PATIENCE)


class Hanging:
    def __init__(self) -> None:
        self.there, self.go_on = threading.Event(), threading.Event()
        self.told: list[str] = []

    def tell(self, notice: QuotaNotice, text: str, /) -> None:
        self.told.append(text)
        self.there.set()
        self.go_on.wait()


def envelope(told: QuotaNotice) -> Envelope:
    return Envelope(1, 1, "quota", Requester(0, 0), 0, pack(told))


def handler(uid: int, **found: Any) -> QuotaHandler:
    return QuotaHandler(lambda: {name: functools.partial(_same, sink) for name, sink in found.items()}, uid)


def _same(sink: Sink) -> Sink:
    return sink


class TestQuota(HandlerContract):
    handler = QuotaHandler(dict)

    def asking(self) -> Envelope:
        return envelope(notice())


def of_group(cause: Cause) -> QuotaNotice:
    return notice(subject=Subject("group", 100, "users"), cause=cause)


def test_the_handler_is_found_by_its_name_and_refuses_requests() -> None:
    found = modules.load_handler(modules.handlers()["quota"], "quota")
    assert isinstance(found, Notified)
    assert isinstance(found, QuotaHandler)
    with pytest.raises(Refused, match="no-service"):
        found.answer(envelope(notice()))


def test_the_text_depends_on_its_reader() -> None:
    noted = Noted()
    handler(ALICE, noted=noted).notice(envelope(notice(ALICE)))
    assert noted.next()[1].startswith("Your files on /home take up 10 GiB, the limit is 10 GiB")
    handler(0, noted=noted).notice(envelope(notice(ALICE)))
    assert noted.next()[1].startswith("The files of user alice on /home take up")


@pytest.mark.parametrize(
    ("told", "meant"),
    [
        (notice(ALICE), True),
        (notice(BOB, "bob"), False),
        (notice(BOB, "bob", cause=Cause(ALICE, "alice")), True),
        (notice(BOB, "bob", cause=Cause()), False),
        (notice(ALICE, cause=Cause(BOB, "bob")), True),
        (of_group(Cause(ALICE, "alice")), True),
        (of_group(Cause(BOB, "bob")), False),
        (of_group(Cause()), True),  # of those that this user was told of before
    ],
    ids=[
        "own",
        "another's",
        "another's by this user",
        "another's by the system",
        "own by another",
        "a group's by this user",
        "a group's by another",
        "a group's by the system",
    ],
)
def test_a_users_daemon_refuses_notices_about_others(told: QuotaNotice, meant: bool) -> None:
    noted, system = Noted(), Noted()
    asked = handler(ALICE, noted=noted)
    if meant:
        asked.notice(envelope(told))
        assert noted.next()[0] == told
    else:
        with pytest.raises(PeerError, match=f"is about uid {BOB}, this is the daemon of {ALICE}"):
            asked.notice(envelope(told))
    handler(0, system=system).notice(envelope(told))
    assert system.next()[0] == told


def test_a_malformed_notice_is_refused() -> None:
    with pytest.raises(PeerError, match="quota notice"):
        handler(ALICE).notice(envelope(notice())._replace(body=b"{}"))


def test_a_sink_that_hangs_delays_no_other_and_gets_the_newest_state() -> None:
    hanging, noted = Hanging(), Noted()
    asked = handler(ALICE, hanging=hanging, noted=noted)
    asked.notice(envelope(notice(used=1)))
    assert hanging.there.wait(PATIENCE)
    assert noted.next()[0].used == 1

    def thousand() -> None:
        for used in range(2, 1002):
            asked.notice(envelope(notice(used=used)))

    in_time(thousand, "a thousand notices, while it hangs")
    until(lambda: noted.next()[0].used == 1001, "the newest")
    hanging.go_on.set()
    until(lambda: len(hanging.told) == 2, "the newest state, and none of those between")
    assert "1001 bytes" in hanging.told[1]


def delivery(sink: Opener, tmp_path: Path) -> tuple[Delivery, EventLog, Callable[[], str]]:
    file = tmp_path / "log"
    log = EventLog("test", os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND))
    return Delivery("mine", sink, log), log, file.read_text


def test_a_sink_that_raises_still_gets_the_next_notice(tmp_path: Path) -> None:
    noted = Noted(ModuleFailed("out of paper"), RuntimeError("secret"), SystemExit(3))
    mine, _, log = delivery(lambda: noted, tmp_path)
    for uid in range(4):
        mine.put(notice(uid), str(uid))
    assert noted.next()[1] == "3"
    until(lambda: "sink-works" in log(), "what the log says")
    assert "sink-failed sink=mine why='out of paper'" in log()
    assert "RuntimeError at " in log()
    assert "SystemExit at " in log()
    assert "secret" not in log()


def test_a_sink_that_asks_to_try_later_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = Noted(TryLater("not there yet"), TryLater("not there yet"))
    mine, _, log = delivery(lambda: noted, tmp_path)
    pauses: list[float] = []

    class Clock:
        """Moved by those who wait. The pauses are not shortened."""

        now = 100.0

        def wait(self, seconds: float | None = None) -> bool:
            if seconds is None:
                return wait()
            pauses.append(seconds)
            self.now += seconds
            return False

    clock, wait = Clock(), mine._change.wait
    monkeypatch.setattr(delivering, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(delivering, "random", SimpleNamespace(random=lambda: 0.0))
    monkeypatch.setattr(mine._change, "wait", clock.wait)
    mine.put(notice(), "once")
    assert noted.next()[1] == "once"
    assert pauses == [1.0, 2.0]
    until(lambda: "sink-works" in log(), "what the log says")
    assert log().count("not there yet") == 1


def test_a_sink_that_cannot_be_opened_is_opened_at_the_next_notice(tmp_path: Path) -> None:
    noted, failures = Noted(), [UsageError("quota.mine.colour: unknown")]

    def opened() -> Noted:
        if failures:
            raise failures.pop()
        return noted

    mine, _, log = delivery(opened, tmp_path)
    mine.put(notice(1), "one")
    until(lambda: "quota.mine.colour: unknown" in log(), "what the log says")
    mine.put(notice(2), "two")
    assert noted.next()[1] == "two"


def test_a_bad_configuration_is_refused_and_read_again_for_the_next_notice() -> None:
    noted, wrong = Noted(), [ConfigError(Path("/etc/upcall/config.toml"), "quota.sinks: a list of names is needed")]

    def find() -> Mapping[str, Opener]:
        if wrong:
            raise wrong.pop()
        return {"noted": lambda: noted}

    asked = QuotaHandler(find, ALICE)
    with pytest.raises(ModuleFailed, match=r"config.toml: quota.sinks"):
        asked.notice(envelope(notice()))
    asked.notice(envelope(notice()))
    assert noted.next()


def test_users_and_the_system_have_their_own_default_sinks() -> None:
    assert list(sinks.chosen({}, ALICE)) == ["desktop", "terminal", "log"]
    assert list(sinks.chosen({}, 0)) == ["log", "dbus"]
    told = {"sinks": ("mail",), "mail": {}, "webhook": {}}
    assert list(sinks.chosen(told, ALICE)) == ["mail"]
    assert list(sinks.chosen(told, 0)) == ["log", "dbus", "mail", "webhook"]
    assert list(sinks.chosen({**told, "system-sinks": ("terminal",)}, 0)) == ["terminal"]


@pytest.mark.parametrize("name", sorted(sinks.BUILT_IN))
def test_every_sink_of_ours_can_be_opened(name: str) -> None:
    settings = {"webhook": {"url": "https://example.org/"}}
    assert callable(sinks.opened(name, settings).tell)


OUTSIDER = """
class Made:
    def __init__(self, colour): self.colour = colour
    def tell(self, notice, text, /): print(self.colour, text)
class Lamp:
    name = "lamp"
    def open(self, settings): return Made(settings["colour"])
lamp, dark = Lamp(), object()
"""


@pytest.fixture
def outsider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an installer would leave there."""
    (tmp_path / "lamps.py").write_text(OUTSIDER)
    info = tmp_path / "lamps-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lamps\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[upcall.sinks]\nlamp = lamps:lamp\ndark = lamps:dark\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("outsider")
def test_an_outsiders_sink_is_opened_if_it_is_sound_and_allowed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"sinks": ("lamp",), "sink": {"lamp": {"colour": "red"}}}
    sinks.chosen(settings, ALICE)["lamp"]().tell(notice(), "a text")
    assert capsys.readouterr().out == "red a text\n"
    assert "lamp" in sinks.known()
    with pytest.raises(ModuleFailed, match="its name is not 'dark'"):
        sinks.opened("dark", settings)
    with pytest.raises(UsageError, match=r"there is no sink 'siren': .*lamp"):
        sinks.opened("siren", settings)
    monkeypatch.setattr(config, "load", lambda: config.Config(frozenset({"quota"}), (Path("/x"),)))
    with pytest.raises(UsageError, match="'lamp' is installed, but not allowed"):
        sinks.opened("lamp", settings)


@pytest.mark.usefixtures("outsider")
def test_plugin_list_knows_sinks() -> None:
    rows = json.loads(CliRunner().invoke(main, ["plugin", "list", "--json"]).output)
    assert {(row["name"], row["kind"]) for row in rows} >= {("lamp", "sink"), ("quota", "handler")}
    shown = CliRunner().invoke(main, ["plugin", "show", "lamp"])
    assert "lamp  sink, lamps 1" in shown.output


def test_the_sink_in_the_plugin_guide_works(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[3] / "docs" / "plugin-guide.md").read_text()
    code = guide.partition("<!-- sink -->\n```python\n")[2].partition("```")[0]
    found: dict[str, Any] = {}
    exec(code, found)
    made: SinkModule = found["sink"]
    with pytest.raises(UsageError, match=r"quota.sink.diary.file: the absolute path"):
        made.open({})
    made.open({"file": str(tmp_path / "diary")}).tell(notice(at=5), "a text")
    assert (tmp_path / "diary").read_text() == "5 over-hard a text\n"
    with pytest.raises(TryLater, match="Is a directory"):
        made.open({"file": str(tmp_path)}).tell(notice(), "a text")

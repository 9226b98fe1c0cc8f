"""A log that never blocks, over real pipes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from upcall.broker.settings import BrokerSettings
from upcall.process import log as module
from upcall.process.log import EventLog
from upcall.process.settings import dumps
from upcall.testing.processes import RunningBroker, Started, in_time, until


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for end in (reader, writer):
        os.close(end)


def lines(reader: int, log: EventLog) -> list[str]:
    log.flush()
    return os.read(reader, 1 << 20).decode().splitlines()


def test_an_event_is_one_line_with_odd_values_quoted(pipe: tuple[int, int]) -> None:
    log = EventLog("name", pipe[1])
    log("plain", number=5, text="word")
    log("odd", blank="two words", quote='a"b', none="", lines="a\nb", bad="\udcff", path=Path("/x"))
    assert lines(pipe[0], log) == [
        f"name[{os.getpid()}]: plain number=5 text=word",
        f"name[{os.getpid()}]: odd blank='two words' quote='a\"b' none='' lines='a\\nb' bad='\\udcff' path=/x",
    ]


def test_a_flood_of_one_event_is_counted_and_the_others_are_heard(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    log = EventLog("name", pipe[1])
    for number in range(100):
        log("flood", number=number)
    log("other")
    now[0] = 101.5
    log("flood", number=100)
    monkeypatch.undo()
    found = lines(pipe[0], log)
    assert len(found) == 20 + 1 + 2
    assert found[19].endswith("flood number=19")
    assert found[20].endswith("other")
    assert found[21].endswith("flood suppressed=80")
    assert found[22].endswith("flood number=100")


def test_a_noisy_uid_hides_no_event_of_another(pipe: tuple[int, int]) -> None:
    log = EventLog("name", pipe[1])
    for number in range(400):
        log("flood", uid=1001, number=number)
        if number % 40 == 0:
            log("flood", uid=1002, number=number)
    found = lines(pipe[0], log)
    assert sum("uid=1002" in line for line in found) == 10
    assert any("flood uid=1001 suppressed=" in line for line in found)


def test_many_uids_are_limited_together_and_root_is_still_heard(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    log = EventLog("name", pipe[1])
    for uid in range(10_000, 20_000):
        log("flood", uid=uid)
    log("flood", uid=0)
    log("ready")
    monkeypatch.undo()
    found = lines(pipe[0], log)
    assert sum(" flood uid=" in line and "suppressed" not in line for line in found) == module._IN_ALL + 1
    assert found[module._IN_ALL].endswith("flood uid=0")
    assert found[module._IN_ALL + 1].endswith("ready")
    told = sum(int(line.rpartition("suppressed=")[2]) for line in found if "suppressed=" in line)
    assert told == 10_000 - module._IN_ALL
    assert len(found) <= module._IN_ALL + 2 + module._SUMMARIES + 1
    assert not log._seen


def test_all_uids_of_a_person_share_one_limit(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    log = EventLog("name", pipe[1])
    log.person_of = lambda uid: 1001 if uid >= 100_000 else uid
    for uid in range(100_000, 101_000):
        log("flood", uid=uid)
    log("flood", uid=1002)
    monkeypatch.undo()
    found = lines(pipe[0], log)
    assert len(found) == module._PER_SECOND + 2
    assert found[-2].endswith("flood uid=1002")
    assert found[-1].endswith(f"flood uid=1001 suppressed={1000 - module._PER_SECOND}")


def test_a_reader_that_stalls_does_not_block_and_lost_lines_are_counted(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PER_SECOND", 1 << 30)
    os.set_blocking(pipe[1], False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(pipe[1], bytes(4096))
    os.set_blocking(pipe[1], True)
    log = EventLog("name", pipe[1])

    def flood() -> None:
        for number in range(3000):
            log("event", number=number)

    in_time(flood, "3000 events, while no reader has made room")
    os.set_blocking(pipe[0], False)
    text = b""

    def lost() -> bool:
        nonlocal text
        try:
            text += os.read(pipe[0], 1 << 20)
        except BlockingIOError:
            return False
        return b"lost lines=" in text

    until(lost, "what was lost is told")


def test_logging_without_a_reader_raises_nothing(pipe: tuple[int, int]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    log = EventLog("name", writer)
    log("into the void")
    log.flush()
    os.close(writer)


def test_a_broker_with_a_full_log_serves_and_ends(folder: Path) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    with RunningBroker(folder, stderr=writer) as broker:
        for _ in range(50):
            broker.status()
        broker.signal(signal.SIGTERM)
        assert broker.wait() == 0
    os.close(reader)
    os.close(writer)


def test_a_broker_whose_stderr_is_closed_starts(folder: Path) -> None:
    """A service manager may close it."""
    broker_of = f"[sys.executable, '-m', 'upcall.broker', {dumps(BrokerSettings(folder))!r}]"
    code = f"import os, sys; os.close(2); os.execv(sys.executable, {broker_of})"
    with Started(["-c", code], folder.parent / "log") as broker:
        until(lambda: (folder / "broker.sock").exists() or broker.process.poll() is not None, "up, or down")
        assert broker.process.poll() is None

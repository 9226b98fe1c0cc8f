"""The contract of sinks: one that is right keeps it, and each way of being wrong breaks the check for it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from upcall.core.errors import ModuleFailed, UsageError
from upcall.protocols.quota.notice import QuotaNotice
from upcall.sink import TryLater
from upcall.testing.checks import sinks
from upcall.testing.checks.sinks import SINK_CHECKS, SinkSubject
from upcall.testing.sinkcontract import SinkContract
from upcall.testing.subject import ContractBroken, NotApplicable

SETTINGS = {"prefix": "told: "}


class Wall:
    """What it is told stays here."""

    def __init__(self, prefix: str) -> None:
        self.prefix, self.told, self.closed = prefix, list[str](), False

    def tell(self, notice: QuotaNotice, text: str, /) -> Any:
        if self.closed:
            raise RuntimeError("told after it was closed")
        self.told.append(self.prefix + text)

    def close(self) -> None:
        self.closed = True


class WallModule:
    name = "wall"
    sink: type[Wall] = Wall

    def open(self, settings: Mapping[str, Any], /) -> Any:
        if not isinstance(settings.get("prefix", ""), str):
            raise UsageError("quota.sink.wall.prefix: text is needed")
        return self.sink(settings.get("prefix", ""))


class TestWall(SinkContract):
    module = WallModule()

    def settings(self, tmp_path: Path) -> Mapping[str, Any]:
        return SETTINGS


class OfSink(WallModule):
    def __init__(self, sink: type[Wall]) -> None:
        self.sink = sink


class Raising(Wall):
    def tell(self, notice: QuotaNotice, text: str, /) -> Any:
        raise OSError("not today")


class Asking(Wall):
    def tell(self, notice: QuotaNotice, text: str, /) -> Any:
        return True


class Naive(Wall):
    """It takes names for text that can be encoded."""

    def tell(self, notice: QuotaNotice, text: str, /) -> Any:
        notice.subject.name.encode()


class Once(Wall):
    def tell(self, notice: QuotaNotice, text: str, /) -> Any:
        if self.told:
            raise RuntimeError("told already")
        super().tell(notice, text)


class Unclosable(Wall):
    def close(self) -> None:
        raise KeyError("close")


class Hanging(Wall):
    def tell(self, notice: QuotaNotice, text: str, /) -> Any:
        threading.Event().wait()


class Failing(Wall):
    """Which is no breach."""

    def tell(self, notice: QuotaNotice, text: str, /) -> Any:
        raise TryLater("not today") if self.told else ModuleFailed("never")


class Slow(WallModule):
    def open(self, settings: Mapping[str, Any], /) -> Any:
        threading.Event().wait(2 * sinks.QUICK)
        return super().open(settings)


class Credulous(WallModule):
    def open(self, settings: Mapping[str, Any], /) -> Any:
        return Wall("")


class Unnaming(WallModule):
    def open(self, settings: Mapping[str, Any], /) -> Any:
        try:
            return super().open(settings)
        except UsageError:
            raise UsageError("it is wrong") from None


class Strict(WallModule):
    def open(self, settings: Mapping[str, Any], /) -> Any:
        if settings.keys() - {"prefix"}:
            raise KeyError("no such setting")
        return super().open(settings)


class Mute(WallModule):
    def open(self, settings: Mapping[str, Any], /) -> Any:
        super().open(settings)
        return object()


TELLING = {"notices_are_told", "hostile_names_break_nothing", "one_sink_tells_several_notices"}
TELLING |= {"another_sink_may_be_opened_after_it_was_closed"}


@pytest.mark.parametrize(
    ("module", "broken"),
    [
        (WallModule(), set()),
        (OfSink(Failing), set()),
        (OfSink(Raising), TELLING),
        (OfSink(Asking), TELLING),
        (OfSink(Hanging), TELLING),
        (OfSink(Naive), {"hostile_names_break_nothing"}),
        (OfSink(Once), {"one_sink_tells_several_notices"}),
        (OfSink(Unclosable), TELLING | {"it_opens_quickly", "unknown_settings_break_nothing"}),
        (Slow(), {"it_opens_quickly"}),
        (Credulous(), {"wrong_settings_are_refused_by_name"}),
        (Unnaming(), {"wrong_settings_are_refused_by_name"}),
        (Strict(), {"unknown_settings_break_nothing"}),
        (Mute(), TELLING | {"it_opens_quickly"}),
    ],
    ids=lambda value: getattr(value, "sink", Wall).__name__ if isinstance(value, OfSink) else type(value).__name__,
)
def test_each_broken_sink_fails_its_own_checks_only(
    monkeypatch: pytest.MonkeyPatch, module: WallModule, broken: set[str]
) -> None:
    monkeypatch.setattr(sinks, "QUICK", 0.1 if isinstance(module, Slow) else 30.0)
    monkeypatch.setattr(sinks, "PATIENCE", 0.2 if module.sink is Hanging else 30.0)
    found = set()
    for check in SINK_CHECKS:
        try:
            check(SinkSubject(module, SETTINGS))
        except ContractBroken:
            found.add(check.__name__)
    assert found == broken


def test_settings_are_not_checked_without_any() -> None:
    with pytest.raises(NotApplicable, match="no settings were given"):
        sinks.wrong_settings_are_refused_by_name(SinkSubject(WallModule()))

"""Defines the checks of the contract of sinks. `SINK_CHECKS` lists them in the order in which to run them.

Each is a function of a `SinkSubject` that raises ContractBroken, or NotApplicable. Does not need pytest. Deliveries
may fail: the machine may have no desktop and no mail server. But each result must be None, or an error that
`Sink.tell` allows. The sinks really tell people what the checks give them: test notices.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from upcall.core.errors import ModuleFailed, UsageError
from upcall.protocols.quota.notice import QuotaNotice, printable, sentence
from upcall.sink import ClosableSink, Sink, SinkModule
from upcall.testing.notices import hostile, notice
from upcall.testing.subject import ContractBroken, NotApplicable, described, expect

QUICK = 1.0  # seconds for `open`, which the thread of the first notice waits for
PATIENCE = 60.0  # seconds for one notice
CALLS = 3


class SinkSubject(NamedTuple):
    """A kind of sink, with settings that are right: its table [quota.sink.NAME] of the configuration."""

    module: SinkModule
    settings: Mapping[str, Any] = {}
    uid: int = 5001  # the user whom the notices concern


SinkCheck = Callable[[SinkSubject], None]


def it_opens_quickly(subject: SinkSubject) -> None:
    begun = time.monotonic()
    _close(_opened(subject))
    took = time.monotonic() - begun
    expect(took <= QUICK, f"`open` took {took:.1f} s, at most {QUICK:g} are right: connect in `tell`")


def wrong_settings_are_refused_by_name(subject: SinkSubject) -> None:
    """A value of another type."""
    if not subject.settings:
        raise NotApplicable("no settings were given")
    for name in subject.settings:
        wrong = {**subject.settings, name: _Nothing()}
        try:
            _close(subject.module.open(wrong))
        except UsageError as error:
            expect(name in str(error), f"the error for a wrong {name!r} does not name it: {error}")
        except Exception as error:
            raise ContractBroken(f"a wrong {name!r}: UsageError was expected, not {described(error)}") from error
        else:
            raise ContractBroken(f"a wrong {name!r} was not refused")


def unknown_settings_break_nothing(subject: SinkSubject) -> None:
    """They may be refused, or ignored."""
    try:
        _close(subject.module.open({**subject.settings, "no-such-setting": 1}))
    except UsageError as error:
        expect("no-such-setting" in str(error), f"the error for an unknown setting does not name it: {error}")
    except Exception as error:
        raise ContractBroken(f"an unknown setting: UsageError was expected, not {described(error)}") from error


def notices_are_told(subject: SinkSubject) -> None:
    _tell(subject, [notice(subject.uid)])


def hostile_names_break_nothing(subject: SinkSubject) -> None:
    _tell(subject, [hostile(subject.uid)])


def one_sink_tells_several_notices(subject: SinkSubject) -> None:
    _tell(subject, [notice(subject.uid, percent=90 + number) for number in range(CALLS)])


def another_sink_may_be_opened_after_it_was_closed(subject: SinkSubject) -> None:
    for _ in range(CALLS):
        _close(_opened(subject))
    _tell(subject, [notice(subject.uid)])


SINK_CHECKS: tuple[SinkCheck, ...] = (
    it_opens_quickly,
    wrong_settings_are_refused_by_name,
    unknown_settings_break_nothing,
    notices_are_told,
    hostile_names_break_nothing,
    one_sink_tells_several_notices,
    another_sink_may_be_opened_after_it_was_closed,
)


class _Nothing:
    """No value that a configuration can have."""


def _opened(subject: SinkSubject) -> Sink:
    try:
        sink = subject.module.open(subject.settings)
    except Exception as error:
        raise ContractBroken(f"`open` raised {described(error)}") from error
    expect(callable(getattr(sink, "tell", None)), f"`open` gave a {type(sink).__name__}, which has no `tell`")
    return sink


def _close(sink: Sink) -> None:
    if isinstance(sink, ClosableSink):
        try:
            sink.close()
        except Exception as error:
            raise ContractBroken(f"`close` raised {described(error)}") from error


def _tell(subject: SinkSubject, notices: list[QuotaNotice]) -> None:
    """Opens a sink, tells it the notices in a thread of its own, as the daemon does, and closes it."""
    broken: list[ContractBroken] = []

    def work() -> None:
        try:
            sink = _opened(subject)
            for one in notices:
                _tell_one(sink, one, subject.uid)
            _close(sink)
        except ContractBroken as error:
            broken.append(error)

    thread = threading.Thread(target=work, name="sink", daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if thread.is_alive():
        raise ContractBroken(f"`tell` has not returned within {PATIENCE:g} s: it needs a time-out")
    if broken:
        raise broken[0]


def _tell_one(sink: Sink, told: QuotaNotice, uid: int) -> None:
    try:
        tell: Callable[[QuotaNotice, str], Any] = sink.tell
        result = tell(told, printable(sentence(told, told.at, uid)))
    except ModuleFailed:  # TryLater is one
        return
    except BaseException as error:
        raise ContractBroken(
            f"`tell` raised {described(error)}: TryLater or ModuleFailed is right for what cannot be delivered"
        ) from error
    expect(result is None, f"`tell` gave a {type(result).__name__}: nothing is expected")

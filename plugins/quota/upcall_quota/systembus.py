"""Sends the D-Bus signal of quota-tools' quota_nld on the system bus, for programs that listen to it.

Interface com.system.quota.warning, member warning, path /: quota type u, id of the quota t, warning u, device's major
and minor number u u, uid of who wrote t, as in the kernel's message (quota_nld.c, write_dbus_warning).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from jeepney import DBusAddress, new_signal

from upcall.protocols.quota.notice import TEST, QuotaNotice
from upcall.sink import Sink, TryLater
from upcall_quota.bus import TROUBLE, Bus, system_buses, words

_FROM: Final = DBusAddress("/", interface="com.system.quota.warning")


class Signal:
    """A sink that sends one signal for each notice of a kernel warning. The signal cannot express other notices."""

    def __init__(self, buses: Callable[[], Iterator[str]] = system_buses) -> None:
        self._buses = buses

    def tell(self, notice: QuotaNotice, text: str, /) -> None:
        raw = notice.raw
        if raw is None and notice.event != TEST:
            return
        bus = Bus(self._buses())  # a new connection each time: a kept one would have to be read
        try:
            if raw is not None:
                body = (raw.qtype, notice.subject.id, raw.warning, raw.major, raw.minor, notice.cause.uid or 0)
                bus.send(new_signal(_FROM, "warning", "utuuut", body))
        except TROUBLE as error:
            raise TryLater(f"the system bus does not answer: {words(error)}") from error
        finally:
            bus.close()


class SignalModule:
    name = "dbus"

    def open(self, settings: Mapping[str, Any], /) -> Sink:
        return Signal()


sink = SignalModule()

"""Shows notices as desktop notifications: org.freedesktop.Notifications, version 1.2, on the session bus.

Source: https://specifications.freedesktop.org/notification-spec. Notify takes (app_name s, replaces_id u, app_icon s,
summary s, body s, actions as, hints a{sv}, expire_timeout i in ms, 0 for never) and returns the notification's id.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, Final

from jeepney import DBusAddress, DBusErrorResponse, new_method_call

from upcall.core.errors import ModuleFailed
from upcall.protocols.quota.notice import BELOW, QuotaNotice, printable
from upcall.sink import Sink, TryLater
from upcall_quota.bus import TROUBLE, Bus, session_buses, words
from upcall_quota.waiting import key_of
from upcall_quota.words import CRITICAL, LOW, NORMAL, headline, urgency

_SERVER: Final = DBusAddress(
    "/org/freedesktop/Notifications", "org.freedesktop.Notifications", "org.freedesktop.Notifications"
)
_EXPIRE: Final = {LOW: 10_000, NORMAL: 30_000, CRITICAL: 0}  # ms
_KEPT: Final = 64  # limit of notifications whose ids are kept
_NOBODY: Final = ("org.freedesktop.DBus.Error.ServiceUnknown", "org.freedesktop.DBus.Error.NameHasNoOwner")


class Desktop:
    """Shows one notification for each quota, and updates it. Keeps the connection: a server may let only the
    connection that made a notification replace it."""

    def __init__(self, buses: Callable[[], Iterator[str]] = session_buses) -> None:
        self._buses = buses
        self._bus: Bus | None = None
        self._bubbles: dict[Hashable, int] = {}

    def tell(self, notice: QuotaNotice, text: str, /) -> None:
        """Shows a notice. If the kept connection has ended meanwhile, tries once more with a new one. ModuleFailed."""
        known = self._bus is not None
        try:
            self._show(notice, text)
        except TROUBLE as error:
            self.close()
            if not known:
                raise TryLater(f"the session bus does not answer: {words(error)}") from error
            self.tell(notice, text)
        except DBusErrorResponse as error:
            if error.name in _NOBODY:
                raise TryLater("nobody shows notifications on the session bus") from error
            raise ModuleFailed(f"the notification server refuses: {printable(error.name)[:100]}") from error

    def _show(self, notice: QuotaNotice, text: str) -> None:
        if self._bus is None:
            self._bus, self._bubbles = Bus(self._buses()), {}
        (able,) = self._bus.call(new_method_call(_SERVER, "GetCapabilities"))  # each time: may be another server
        key, urgent = key_of(notice), urgency(notice)
        title, body = headline(notice), printable(text)
        if "body" not in able:
            title, body = f"{title}: {body}", ""
        elif "body-markup" in able:
            body = _escaped(body)
        hints = {
            "urgency": ("y", urgent),
            "category": ("s", "device" if notice.event == BELOW else "device.error"),
        }
        replaces = self._bubbles.pop(key, 0)
        what: tuple[Any, ...] = ("upcall", replaces, "drive-harddisk", title, body, [], hints, _EXPIRE[urgent])
        (bubble,) = self._bus.call(new_method_call(_SERVER, "Notify", "susssasa{sv}i", what))
        if len(self._bubbles) >= _KEPT:
            del self._bubbles[next(iter(self._bubbles))]
        self._bubbles[key] = bubble

    def close(self) -> None:
        if self._bus is not None:
            self._bus.close()
            self._bus = None


def _escaped(text: str) -> str:
    """Escapes a text for servers whose body is markup. The specification defines these three entities only."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


class DesktopModule:
    name = "desktop"

    def open(self, settings: Mapping[str, Any], /) -> Sink:
        return Desktop()


sink = DesktopModule()

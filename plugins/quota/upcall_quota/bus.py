"""A message bus (D-Bus), by jeepney: connected when it is needed, and never waited for without end."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from typing import Any, Final

from jeepney import DBusErrorResponse, Message
from jeepney.bus import get_connectable_addresses
from jeepney.io.blocking import DBusConnection, prep_socket
from jeepney.wrappers import unwrap_msg

from upcall.sink import TryLater
from upcall_quota.patience import cut_off

PATIENCE: Final = 5.0  # seconds for each step

# What jeepney raises on a bus that is not there, not ours, or talks nonsense.
TROUBLE: Final = (OSError, ValueError, RuntimeError, LookupError, AttributeError, struct.error)


class Bus:
    """A connection to the first of these buses that answers. OSError and others of TROUBLE once it is gone."""

    def __init__(self, paths: Iterator[str]) -> None:
        self._connection = _connected(paths)

    def send(self, message: Message) -> None:
        """A message that wants no answer."""
        with cut_off(PATIENCE, lambda: self._connection.sock):
            self._connection.send(message)

    def call(self, message: Message) -> tuple[Any, ...]:
        """The body of the answer. DBusErrorResponse if it is an error."""
        with cut_off(PATIENCE, lambda: self._connection.sock):
            answer = self._connection.send_and_get_reply(message, timeout=PATIENCE)
        body: tuple[Any, ...] = unwrap_msg(answer)
        return body

    def close(self) -> None:
        self._connection.close()


def _connected(paths: Iterator[str]) -> DBusConnection:
    why = "no address of one is known"
    for path in paths:
        try:
            sock = prep_socket(path, timeout=PATIENCE)
        except TROUBLE as error:
            why = f"{path.replace(chr(0), '@')}: {_words(error)}"
            continue
        try:
            with cut_off(PATIENCE, lambda sock=sock: sock):  # type: ignore[misc]
                return DBusConnection(sock)  # which waits for an answer to Hello without end
        except (*TROUBLE, DBusErrorResponse) as error:
            sock.close()
            why = f"{path.replace(chr(0), '@')}: {_words(error)}"
    raise TryLater(f"no message bus: {why}")


def _words(error: BaseException) -> str:
    """What went wrong, as far as it cannot hold what a peer has said."""
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__


def session_buses(environment: Mapping[str, str] = os.environ) -> Iterator[str]:
    """Where this user's session bus may be: as the environment says, and where systemd puts it. It may appear only
    after the daemon has started, so ask each time."""
    yield from _addresses(environment.get("DBUS_SESSION_BUS_ADDRESS", ""))
    if (folder := environment.get("XDG_RUNTIME_DIR", "")).startswith("/"):
        yield f"{folder}/bus"
    yield f"/run/user/{os.geteuid()}/bus"


def system_buses(environment: Mapping[str, str] = os.environ) -> Iterator[str]:
    yield from _addresses(environment.get("DBUS_SYSTEM_BUS_ADDRESS", "") or "unix:path=/run/dbus/system_bus_socket")


def _addresses(text: str) -> Iterator[str]:
    try:
        yield from get_connectable_addresses(text)
    except (ValueError, LookupError, RuntimeError):
        return  # not of the form that D-Bus gives them, or a transport that is not known

"""Connects to a message bus (D-Bus) by jeepney, on first use, with a time-out for each step."""

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

# Exceptions of jeepney if a bus is not there, refuses us, or sends malformed messages.
TROUBLE: Final = (OSError, ValueError, RuntimeError, LookupError, AttributeError, struct.error)


class Bus:
    """A connection to the first of these buses that answers. Its methods raise TROUBLE, such as OSError, if it
    fails."""

    def __init__(self, paths: Iterator[str]) -> None:
        self._connection = _connected(paths)

    def send(self, message: Message) -> None:
        """Sends a message that has no reply."""
        with cut_off(PATIENCE, lambda: self._connection.sock):
            self._connection.send(message)

    def call(self, message: Message) -> tuple[Any, ...]:
        """Sends a method call; returns the body of the reply. Blocks for at most PATIENCE seconds.
        DBusErrorResponse."""
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
            why = f"{path.replace(chr(0), '@')}: {words(error)}"
            continue
        try:
            with cut_off(PATIENCE, lambda sock=sock: sock):  # type: ignore[misc]
                return DBusConnection(sock)  # waits for the reply to Hello without a time-out
        except (*TROUBLE, DBusErrorResponse) as error:
            sock.close()
            why = f"{path.replace(chr(0), '@')}: {words(error)}"
    raise TryLater(f"no message bus: {why}")


def words(error: BaseException) -> str:
    """Describes an error without text that a peer has sent."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, ConnectionError):  # jeepney's, at end of file
        return "it closed the connection"
    return "no reply in time" if isinstance(error, TimeoutError) else type(error).__name__


def session_buses(environment: Mapping[str, str] = os.environ) -> Iterator[str]:
    """Yields possible paths of the user's session bus: from the environment, and systemd's. Call it for each attempt:
    a bus may start after the daemon."""
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
        return  # malformed, or an unknown transport

"""Runs a private message bus, and a desktop that shows notifications on a virtual screen, for tests and for the
picture in the documentation. Needs dbus-daemon; Xvfb and dunst for the desktop; scrot for pictures."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from jeepney import DBusAddress, Properties, new_method_call

from upcall.sink import TryLater
from upcall.testing.processes import until
from upcall_quota.bus import Bus

_CONFIG: Final = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type><listen>unix:path={path}</listen><auth>EXTERNAL</auth>
  <policy context="default"><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/></policy>
</busconfig>
"""  # noqa: E501
_DUNST: Final = """[global]
    font = DejaVu Sans 11
    width = 420
    height = 200
    offset = 20x20
    origin = top-right
    icon_path = ""
    min_icon_size = 0
    format = "<b>%s</b>\\n%b"
    markup = full
    word_wrap = yes
    padding = 9
    horizontal_padding = 14
    frame_width = 1
    frame_color = "#b6bcc4"
    separator_color = frame
[urgency_low]
    background = "#f3f6f4"
    foreground = "#20402c"
[urgency_normal]
    background = "#fffdf5"
    foreground = "#2b2b2b"
[urgency_critical]
    background = "#fff1f0"
    foreground = "#5c1010"
"""


def lacking(*programs: str) -> str:
    """Returns which of these programs are not installed, as the reason for skipping a test; "" if all are."""
    missing = [name for name in programs if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


@contextlib.contextmanager
def running(arguments: Sequence[str], environment: Mapping[str, str] | None = None, fd: int = -1) -> Iterator[None]:
    """Runs a program until the block ends."""
    process = subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **(environment or {})},
        pass_fds=[fd] if fd >= 0 else [],
    )
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def message_bus(folder: Path) -> Iterator[str]:
    """Runs a bus at FOLDER/bus; yields that path."""
    path, written = folder / "bus", folder / "bus.conf"
    written.write_text(_CONFIG.format(path=path))
    with running(["dbus-daemon", f"--config-file={written}", "--nofork", "--nopidfile"]):
        until(lambda: _answers(str(path)), "a message bus")
        yield str(path)


def _answers(bus: str) -> bool:
    try:
        Bus(iter([bus])).close()
    except TryLater:
        return False
    return True


class Desktop:
    """The virtual screen and its notifications."""

    _COMMAND = DBusAddress("/org/freedesktop/Notifications", "org.freedesktop.Notifications", "org.dunstproject.cmd0")

    def __init__(self, bus: str, display: str) -> None:
        self._display = display
        self._bus = Bus(iter([bus]))

    def displayed(self) -> int:
        """Returns the number of visible notifications."""
        ((_, number),) = self._bus.call(Properties(self._COMMAND).get("displayedLength"))
        return int(number)

    def close_all(self) -> None:
        self._bus.call(new_method_call(self._COMMAND, "NotificationCloseAll"))

    def history(self) -> list[dict[str, Any]]:
        """Returns the closed notifications, the last first."""
        (bubbles,) = self._bus.call(new_method_call(self._COMMAND, "NotificationListHistory"))
        return [{key: value for key, (_, value) in one.items()} for one in bubbles]

    def picture(self, path: Path, area: str) -> None:
        """Writes a screenshot. `area`: "x,y,width,height" in pixels."""
        command = ["scrot", "--overwrite", "--autoselect", area, str(path)]
        subprocess.run(command, env={**os.environ, "DISPLAY": self._display}, check=True, timeout=20)

    def close(self) -> None:
        self._bus.close()


@contextlib.contextmanager
def desktop(folder: Path, bus: str) -> Iterator[Desktop]:
    """Runs Xvfb, and dunst on the bus."""
    written = folder / "dunstrc"
    written.write_text(_DUNST)
    reader, writer = os.pipe()
    screen = ["Xvfb", "-displayfd", str(writer), "-screen", "0", "800x300x24", "-wr", "-nolisten", "tcp"]
    with os.fdopen(reader, "rb") as told, running(screen, fd=writer):
        os.close(writer)
        display = f":{int(told.readline())}"
        surroundings = {"DISPLAY": display, "DBUS_SESSION_BUS_ADDRESS": f"unix:path={bus}"}
        with running(["dunst", "-conf", str(written)], surroundings):
            until(lambda: _has_server(bus), "a notification server")
            shown = Desktop(bus, display)
            try:
                yield shown
            finally:
                shown.close()


def _has_server(bus: str) -> bool:
    address = DBusAddress("/org/freedesktop/DBus", "org.freedesktop.DBus", "org.freedesktop.DBus")
    asking = Bus(iter([bus]))
    try:
        ask = new_method_call(address, "NameHasOwner", "s", ("org.freedesktop.Notifications",))
        return bool(asking.call(ask)[0])
    finally:
        asking.close()

"""Runs a private system bus with a simulated logind: real signals and descriptors, without suspending the machine."""

from __future__ import annotations

import contextlib
import os
import pwd
import select
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jeepney import (
    DBusAddress,
    HeaderFields,
    Message,
    MessageType,
    message_bus,
    new_error,
    new_method_return,
    new_signal,
)
from jeepney.io.blocking import DBusConnection, open_dbus_connection

from upcall.testing.processes import until

NAME = "org.freedesktop.login1"
PATH = "/org/freedesktop/login1"
MANAGER, SESSION, USER = f"{NAME}.Manager", f"{NAME}.Session", f"{NAME}.User"


def _missing() -> str:
    """Returns why a bus cannot run here, as the reason for skipping a test; "" if it can."""
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return f"dbus-daemon does not start for somebody without a name, uid {os.getuid()}"
    return "" if shutil.which("dbus-daemon") else "not installed: dbus-daemon"


MISSING = _missing()

_CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type><listen>unix:path={path}</listen><auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/><allow own="*"/><allow send_type="method_call"/><allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/><allow receive_type="method_return"/>
    <allow receive_type="error"/><allow receive_type="signal"/>
  </policy>
</busconfig>
"""


class SystemBus:
    """A dbus-daemon at FOLDER/bus, which can be restarted."""

    def __init__(self, folder: Path) -> None:
        self.path, self._config = folder / "bus", folder / "bus.conf"
        self._config.write_text(_CONFIG.format(path=self.path))
        self.address = f"unix:path={self.path}"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        command = ["dbus-daemon", f"--config-file={self._config}", "--nofork", "--nopidfile"]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(self._answers, "a message bus")

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):
            self.connect().close()
            return True
        return False

    def connect(self) -> DBusConnection:
        return open_dbus_connection(self.address, enable_fds=True)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class Logind:
    """A simulated logind: the methods and signals that upcall uses."""

    def __init__(self, bus: SystemBus, uid: int) -> None:
        self.uid = uid
        self.sessions: dict[str, dict[str, tuple[str, Any]]] = {}
        self.asleep, self.refuse_inhibit = False, False
        self.inhibitors: list[int] = []  # logind's ends
        self.calls: list[str] = []
        self._lock = threading.Lock()
        self._connection = bus.connect()
        answer = self._connection.send_and_get_reply(message_bus.RequestName(NAME, 4))
        assert answer.body == (1,), answer.body
        threading.Thread(target=self._serve, daemon=True).start()

    # --- what happens --------------------------------------------------------------------------------------

    def session(
        self, name: str, kind: str = "user", leader: int = 0, tell: bool = True, uid: int | None = None
    ) -> str:
        path = f"{PATH}/session/{name}"
        about: dict[str, tuple[str, Any]] = {
            "Id": ("s", name),
            "Class": ("s", kind),
            "State": ("s", "active"),
            "LockedHint": ("b", False),
            "Leader": ("u", leader),
        }
        with self._lock:
            self.sessions[path] = about | {"_uid": ("u", self.uid if uid is None else uid)}
        if tell:
            self.signal("SessionNew", "so", (name, path))
        return path

    def ends(self, path: str) -> None:
        with self._lock:
            del self.sessions[path]
        self.signal("SessionRemoved", "so", (path.rpartition("/")[2], path))

    def hint(self, path: str, locked: bool) -> None:
        with self._lock:
            self.sessions[path]["LockedHint"] = ("b", locked)
        properties = DBusAddress(path, interface="org.freedesktop.DBus.Properties")
        body: tuple[Any, ...] = (SESSION, {"LockedHint": ("b", locked)}, [])
        self._connection.send(new_signal(properties, "PropertiesChanged", "sa{sv}as", body))

    def sleep(self, begins: bool) -> None:
        self.asleep = begins
        self.signal("PrepareForSleep", "b", (begins,))

    def lock(self, path: str, member: str = "Lock") -> None:
        self._connection.send(new_signal(DBusAddress(path, interface=SESSION), member))

    def signal(self, member: str, signature: str, body: tuple[Any, ...]) -> None:
        self._connection.send(new_signal(DBusAddress(PATH, interface=MANAGER), member, signature, body))

    def waits_before_sleep(self) -> bool:
        """Returns whether a process holds an inhibitor lock."""
        return any(not select.select([fd], [], [], 0)[0] for fd in self.inhibitors)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.sock.shutdown(2)
        for fd in self.inhibitors:
            os.close(fd)
        self.inhibitors.clear()

    # --- what it answers -----------------------------------------------------------------------------------

    def _serve(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while True:
                message = self._connection.receive()
                if message.header.message_type is MessageType.method_call:
                    self._connection.send(self._answer(message))

    def _answer(self, message: Message) -> Message:
        fields = message.header.fields
        member, path = fields[HeaderFields.member], fields[HeaderFields.path]
        self.calls.append(member)
        with self._lock:
            if member == "ListSessions":
                listed = [(one["Id"][1], one["_uid"][1], "u", "", at) for at, one in self.sessions.items()]
                return new_method_return(message, "a(susso)", (listed,))
            if member == "GetAll" and path in self.sessions:
                told = {name: value for name, value in self.sessions[path].items() if name != "_uid"}
                return new_method_return(message, "a{sv}", (told,))
            if member == "Get" and message.body[1] == "PreparingForSleep":
                return new_method_return(message, "v", (("b", self.asleep),))
            if member == "Inhibit" and not self.refuse_inhibit:
                assert message.body[0] == "sleep" and message.body[3] == "delay"
                reader, writer = os.pipe()
                self.inhibitors.append(reader)
                return new_method_return(message, "h", (_Given(writer),))
        return new_error(message, "org.freedesktop.DBus.Error.AccessDenied", "s", ("no",))


class _Given:
    """A descriptor to send; this process's copy is closed when it was sent."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def __del__(self) -> None:
        os.close(self._fd)


@contextlib.contextmanager
def system_bus(folder: Path) -> Iterator[SystemBus]:
    bus = SystemBus(folder)
    try:
        yield bus
    finally:
        bus.stop()

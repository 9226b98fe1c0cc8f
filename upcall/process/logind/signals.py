"""Receives logind's signals about one user: sleep, locked screens, the last logout.

Source: org.freedesktop.login1(5), https://systemd.io/INHIBITOR_LOCKS. A signal counts only if its sender owns the name
org.freedesktop.login1 now: a match rule does not prevent a client of the bus from sending one directly.
"""

from __future__ import annotations

import collections
import contextlib
import os
import select
import socket
import time
from collections.abc import Collection
from typing import Any, Final

from jeepney import DBusAddress, DBusErrorResponse, HeaderFields, Message, MessageType, Properties, new_method_call
from jeepney.bus import get_connectable_addresses
from jeepney.io.blocking import DBusConnection, prep_socket
from jeepney.wrappers import unwrap_msg

from upcall.core.errors import UpcallError
from upcall.process.logind import LOGOUT, MAX_WORD, SCREEN_LOCK, SUSPEND

NAME: Final = "org.freedesktop.login1"
_PATH: Final = "/org/freedesktop/login1"
_MANAGER: Final = "org.freedesktop.login1.Manager"
_SESSION: Final = "org.freedesktop.login1.Session"
_BUS: Final = DBusAddress("/org/freedesktop/DBus", "org.freedesktop.DBus", "org.freedesktop.DBus")
_USUAL: Final = "unix:path=/run/dbus/system_bus_socket"
PATIENCE: Final = 5.0  # seconds, the time-out of a call on the bus
LOCKING: Final = 4.0  # seconds, the time-out of locking in the daemon; logind waits for five (InhibitDelayMaxSec=)
MAX_SESSIONS: Final = 256

# Prefix of the classes of sessions with a person: user, user-early and the like; not greeter, background, manager.
_PERSONS: Final = "user"
_RULES: Final = (
    f"type='signal',sender='{NAME}',path='{_PATH}',interface='{_MANAGER}'",
    f"type='signal',sender='{NAME}',path_namespace='{_PATH}/session'",
    f"type='signal',sender='{_BUS.bus_name}',member='NameOwnerChanged',arg0='{NAME}'",
)


class NoLogind(UpcallError):
    """There is no system bus, or no logind on it."""


class _Session:
    """One session of the user's. `locked`: by the latest signal, of whatever kind. `leader`: a pidfd; -1 if
    unknown."""

    __slots__ = ("leader", "locked", "path")

    def __init__(self, path: str, locked: bool, leader: int) -> None:
        self.path, self.locked, self.leader = path, locked, leader


class Watch:
    """Subscribes to logind's signals at once and reports them over `daemon`. NoLogind; OSError, and whatever jeepney
    raises if messages are malformed."""

    def __init__(self, daemon: socket.socket, uid: int, causes: Collection[str]) -> None:
        self._daemon, self._uid = daemon, uid
        self._causes = frozenset(cause.removesuffix("!") for cause in causes)
        # Not every screen locker sets LockedHint. A lock that an earlier process received as a signal, and that this
        # one cannot read from logind, holds until a signal ends it.
        self._locked_before = f"{SCREEN_LOCK}!" in causes
        self._connection = _connected()
        self._backlog: collections.deque[Message] = collections.deque()
        self._sessions: dict[str, _Session] = {}  # by object path
        self._said: dict[str, bool] = {}
        self._inhibitor = -1
        self._noted: set[str] = set()
        for rule in _RULES:
            self._call(new_method_call(_BUS, "AddMatch", "s", (rule,)))
        self._owner = self._owner_now()
        if not self._owner:
            raise NoLogind("no logind on the system bus")

    def run(self) -> None:
        """Reports changes until the daemon closes its end of the socket. OSError if the bus ends."""
        self._begin()
        while True:
            while self._backlog:
                self._hear(self._backlog.popleft())
            if not self._wait():
                return
            with contextlib.suppress(TimeoutError):
                while True:
                    self._backlog.append(self._connection.receive(timeout=0))

    # --- the current state ---------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Reads and reports the current state from a logind that has just started, or at the start of this process."""
        if SUSPEND in self._causes:
            self._inhibit()
            if isinstance(asleep := self._property(Properties(self._at(_PATH, _MANAGER)), "PreparingForSleep"), bool):
                self._say(SUSPEND, asleep)
        self._look()

    def _look(self) -> None:
        """Reads the user's sessions."""
        if not self._causes & {SCREEN_LOCK, LOGOUT}:
            return
        (listed,) = self._call(new_method_call(self._at(_PATH, _MANAGER), "ListSessions"))
        paths = [path for _, uid, _, _, path in listed[:MAX_SESSIONS] if uid == self._uid]
        before, self._sessions = self._sessions, {}
        for path in paths:
            session = self._session(path, before.pop(path, None))
            if session is not None:
                self._sessions[path] = session
        for gone in before.values():
            _close(gone.leader)
        self._locked_before = False
        self._conclude()

    def _session(self, path: str, known: _Session | None) -> _Session | None:
        """Returns a session; None if it has ended, or is no person's. A session whose processes outlive it is
        `closing`."""
        try:
            (properties,) = self._call(Properties(self._at(path, _SESSION)).get_all())
            about = {name: value for name, (_, value) in properties.items()}
        except (DBusErrorResponse, ValueError, TypeError, AttributeError):
            return None  # it has ended meanwhile
        leader = known.leader if known is not None else _pidfd(about.get("Leader", 0))
        if not str(about.get("Class")).startswith(_PERSONS) or about.get("State") == "closing" or _ended(leader):
            _close(leader)
            return None
        if known is not None:
            return known
        return _Session(path, about.get("LockedHint") is True or self._locked_before, leader)

    def _conclude(self) -> None:
        if SCREEN_LOCK in self._causes:
            self._say(SCREEN_LOCK, any(session.locked for session in self._sessions.values()))
        # Without an earlier login there is no logout: a daemon started by lingering keeps serving.
        if LOGOUT in self._causes and (self._sessions or LOGOUT in self._said):
            self._say(LOGOUT, not self._sessions)

    def _property(self, of: Properties, name: str) -> object:
        try:
            ((_, value),) = self._call(of.get(name))
        except DBusErrorResponse:
            return None
        found: object = value
        return found

    def _owner_now(self) -> str:
        """Returns the unique name of logind, after having the bus start it if necessary; "" if there is none."""
        for _ in range(2):
            with contextlib.suppress(DBusErrorResponse):
                return str(self._call(new_method_call(_BUS, "GetNameOwner", "s", (NAME,)))[0])
            with contextlib.suppress(DBusErrorResponse):
                self._call(new_method_call(_BUS, "StartServiceByName", "su", (NAME, 0)))
        return ""

    # --- signals -------------------------------------------------------------------------------------------

    def _hear(self, message: Message) -> None:
        fields = message.header.fields
        sender, member = fields.get(HeaderFields.sender), fields.get(HeaderFields.member)
        if message.header.message_type is not MessageType.signal:
            return
        if sender == _BUS.bus_name:
            if member == "NameOwnerChanged" and message.body[0] == NAME:
                self._on_owner(message.body[2])
            return
        if sender != self._owner or not self._owner:
            self._note("a signal of logind's that logind has not sent was ignored")
            return
        path = fields.get(HeaderFields.path)
        if path == _PATH:
            self._on_manager(member, message.body)
        elif path in self._sessions:
            self._on_session(self._sessions[path], member, message.body)

    def _on_owner(self, owner: str) -> None:
        """Handles a restart or the end of logind. After its end the reported state is kept."""
        self._owner = owner
        self._release()
        if owner:
            self._begin()

    def _on_manager(self, member: str | None, body: tuple[Any, ...]) -> None:
        if member == "PrepareForSleep" and SUSPEND in self._causes and isinstance(body[0], bool):
            if not body[0]:
                self._inhibit()  # for the next sleep
            self._say(SUSPEND, body[0])
            if body[0]:
                self._release()  # the machine may sleep now
        elif member in ("SessionNew", "SessionRemoved", "UserNew", "UserRemoved"):
            self._look()

    def _on_session(self, session: _Session, member: str | None, body: tuple[Any, ...]) -> None:
        if member in ("Lock", "Unlock"):
            session.locked = member == "Lock"
            self._conclude()
        elif member == "PropertiesChanged" and body[0] == _SESSION:
            hint = body[1].get("LockedHint")
            if hint is not None and isinstance(hint[1], bool):
                session.locked = hint[1]
            if "State" in body[1] or "Active" in body[1] or "State" in body[2]:
                self._look()
            else:
                self._conclude()

    # --- sleep ---------------------------------------------------------------------------------------------

    def _inhibit(self) -> None:
        """Takes an inhibitor lock: logind delays sleep until it is released, for a few seconds at most."""
        self._release()
        arguments = ("sleep", "upcall", "Forgetting passphrases", "delay")
        try:
            (fd,) = self._call(new_method_call(self._at(_PATH, _MANAGER), "Inhibit", "ssss", arguments))
            self._inhibitor = fd.to_raw_fd()
        except DBusErrorResponse as error:
            self._note(f"logind does not wait before it sleeps: {error.name}")

    def _release(self) -> None:
        _close(self._inhibitor)
        self._inhibitor = -1

    # --- the daemon ----------------------------------------------------------------------------------------

    def _say(self, cause: str, on: bool) -> None:
        """Reports a change to the daemon and waits until the daemon has handled it. Unchanged states are not
        repeated."""
        if self._said.get(cause) is on:
            return
        self._said[cause] = on
        word = f"{'on' if on else 'off'} {cause}".encode()
        self._daemon.send(word)
        until = time.monotonic() + LOCKING
        while select.select([self._daemon], [], [], max(0.0, until - time.monotonic()))[0]:
            if (heard := self._daemon.recv(MAX_WORD)) == word:
                return
            if not heard:
                raise SystemExit(os.EX_OK)  # the daemon has ended

    def _note(self, words: str) -> None:
        if words not in self._noted:
            self._noted.add(words)
            self._daemon.send(f"note {words}".encode("utf-8", "backslashreplace")[:MAX_WORD])

    # --- the bus -------------------------------------------------------------------------------------------

    def _wait(self) -> bool:
        """Waits until the bus is readable or the leader of a session has ended (True), or the daemon has ended
        (False)."""
        leaders = {session.leader: session for session in self._sessions.values() if session.leader >= 0}
        poll = select.poll()
        for fd in (self._connection.sock.fileno(), self._daemon.fileno(), *leaders):
            poll.register(fd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll()}
        if self._daemon.fileno() in ready and not self._daemon.recv(MAX_WORD):  # otherwise a late echo
            return False
        if ready & leaders.keys():
            self._look()
        return True

    def _at(self, path: str, interface: str) -> DBusAddress:
        """Returns the address of the current logind by its unique name; the next owner of the name is another
        process."""
        return DBusAddress(path, self._owner, interface)

    def _call(self, message: Message) -> tuple[Any, ...]:
        """Calls a method and returns the body of its reply. Signals received meanwhile are queued. DBusErrorResponse,
        TimeoutError."""
        asked = (message.header.fields[HeaderFields.destination], _BUS.bus_name)
        serial = next(self._connection.outgoing_serial)
        self._connection.send(message, serial=serial)
        while True:
            heard = self._connection.receive(timeout=PATIENCE)
            fields = heard.header.fields
            if fields.get(HeaderFields.reply_serial) == serial and fields.get(HeaderFields.sender) in asked:
                body: tuple[Any, ...] = unwrap_msg(heard)
                return body
            self._backlog.append(heard)


def _connected() -> DBusConnection:
    where = os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or _USUAL
    why = "no address of one is known"
    with contextlib.suppress(ValueError, LookupError, RuntimeError):
        for path in get_connectable_addresses(where):
            try:
                return DBusConnection(prep_socket(path, enable_fds=True, timeout=PATIENCE), enable_fds=True)
            except OSError as error:
                why = f"{path}: {error.strerror or error}"
    raise NoLogind(f"no system bus: {why}")


def _pidfd(pid: object) -> int:
    """Returns a pidfd; -1 if there is no such process or `pid` is not a pid."""
    if isinstance(pid, int) and pid > 0:
        with contextlib.suppress(OSError):
            return os.pidfd_open(pid)
    return -1


def _ended(pidfd: int) -> bool:
    """Returns whether the process has ended; False if unknown."""
    return pidfd >= 0 and bool(select.select([pidfd], [], [], 0)[0])


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)

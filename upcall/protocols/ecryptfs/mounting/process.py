"""Accepts requests to mount, and forks a child for each, which checks, mounts, answers and ends (`mounter`).

One child of a person at a time, so that nobody is ahead of a limit; others of that person wait in line. A child that
does not end in time is killed and its request is answered here. A person whose child cannot be killed, because the
kernel waits for a filesystem, is refused until it has ended; nobody else notices.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import select
import signal
import socket
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

from upcall import config
from upcall.config import ConfigError
from upcall.core.errors import PeerError, UsageError
from upcall.kernel import ucred
from upcall.kernel.local import listen, unlink_quietly
from upcall.kernel.notify import Manager
from upcall.kernel.process import harden, raise_descriptor_limit
from upcall.process.hardening import of_mount_source
from upcall.process.log import EventLog
from upcall.process.loop import LISTENER, URGENT, Loop
from upcall.process.loop_process import LoopProcess
from upcall.process.paths import SYSTEM_FOLDER, Place, own_folder, own_place
from upcall.process.people import People
from upcall.process.trust import Fault, log_faults
from upcall.protocols.ecryptfs.mounting.allowed import MountRules, check_allowed, rules
from upcall.protocols.ecryptfs.mounting.denied import FAILED, LATER, MISCONFIGURED, WRONG, Denied
from upcall.protocols.ecryptfs.mounting.messages import (
    DESCRIPTORS,
    MAX_REQUEST,
    MOUNT,
    UNMOUNT,
    MountReply,
    MountRequest,
    pack_reply,
    take_request,
)
from upcall.protocols.ecryptfs.mounting.mounter import Mounter, Mounting
from upcall.protocols.ecryptfs.mounting.requester import check, receive, requester_of
from upcall.protocols.ecryptfs.mounting.settings import MountSettings
from upcall.protocols.ecryptfs.mounting.system import System

SOCKET: Final = "mount.sock"
WORKING_FOLDER: Final = "mount"  # in the folder of the socket: root's own
_DEADLINE: Final = 10.0  # seconds of a request
_ARRIVAL: Final = 3.0  # seconds for the request to arrive, of these
_CHILDREN: Final = 32  # in all
_IN_LINE, _IN_LINES = 8, 256  # connections of a person, and of all, that wait for a child
_BURST, _PER_SECOND, _CREDITS = 20.0, 2.0, 4096  # requests of a person; persons whose credit is stored
_ACCEPTS: Final = 32  # in a turn
_AGAIN: Final = 1.0  # seconds until a child is started again after that has failed
_MAX_REPORT: Final = 4096  # bytes, which fit into a pipe
_SHOWN: Final = 256  # characters of a path or reason in the log, of at most twelve bytes in a report

MakeSystem = Callable[[], Mounting]


class _Child:
    """A child process and the connection that it serves. `person`: for whom it works."""

    def __init__(self, connection: socket.socket, person: int, uid: int, pid: int, report: int) -> None:
        self.connection, self.person, self.uid, self.pid, self.report = connection, person, uid, pid, report
        self.pidfd = os.pidfd_open(pid)
        self.killed = False


class MountSource:
    """Serves at the socket in `place` until `close`. All methods run in the loop's thread."""

    def __init__(
        self,
        loop: Loop,
        place: Place,
        log: EventLog,
        make_system: MakeSystem,
        get_rules: Callable[[], MountRules],
        deadline: float = _DEADLINE,
    ) -> None:
        """`deadline`: seconds of a request. OSError; UsageError if another source listens there."""
        self._deadline = deadline
        self._loop, self._log, self._make_system, self._get_rules = loop, log, make_system, get_rules
        self._path = place.folder / SOCKET
        self._people = People(log)
        self._listener = listen(self._path, 0o666)
        # Inherited by connections: set later, a request that came at once would lack its sender's credentials.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._children: dict[int, _Child] = {}  # by person
        self._lines: dict[int, deque[tuple[socket.socket, int]]] = {}  # by person: connections and their uids
        self._credits: dict[int, tuple[float, float]] = {}
        self._starting = loop.timer(self._start_all)
        loop.add(self._listener, self._on_connect, LISTENER)

    # --- admission -----------------------------------------------------------------------------------------

    def _on_connect(self) -> None:
        self._people.look(self._loop.now)
        for _ in range(_ACCEPTS):
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                self._log("connection-accept-failed", socket=SOCKET, why=error)
                self._loop.mute(self._listener, self._loop.now + 0.1)
                return
            self._admit(connection)

    def _admit(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        uid = ucred.of_peer(connection).uid
        person = self._people.of(uid)
        child = self._children.get(person)
        line = self._lines.get(person, ())
        if not self._has_credit(person):
            self._refuse(connection, uid, LATER, "too many requests: wait a few seconds")
        elif child is not None and child.killed:
            why = "an earlier request still hangs in the kernel, which waits for one of your filesystems"
            self._refuse(connection, uid, LATER, why)
        elif len(line) >= _IN_LINE or sum(map(len, self._lines.values())) >= _IN_LINES:
            self._refuse(connection, uid, LATER, "too many requests at once: wait a few seconds")
        else:
            self._lines.setdefault(person, deque()).append((connection, uid))
            self._start(person)

    def _has_credit(self, person: int) -> bool:
        now = self._loop.now
        credit, since = self._credits.get(person, (_BURST, now))
        credit = min(_BURST, credit + (now - since) * _PER_SECOND)
        if len(self._credits) >= _CREDITS and person not in self._credits:
            kept = ((one, had) for one, had in self._credits.items() if had[0] + (now - had[1]) * _PER_SECOND < _BURST)
            self._credits = dict(kept)
        self._credits[person] = credit - (credit >= 1), now  # what is refused costs nothing
        return credit >= 1

    def _refuse(self, connection: socket.socket, uid: int, status: int, why: str) -> None:
        self._log("mount-refused", uid=uid, why=why)
        _answer(connection, MountReply(status, why))
        connection.close()

    # --- children ------------------------------------------------------------------------------------------

    def _start(self, person: int) -> None:
        """Starts a child for the person's next request, unless one runs or there are too many."""
        if person in self._children or person not in self._lines or len(self._children) >= _CHILDREN:
            return
        line = self._lines[person]
        connection, uid = line.popleft()
        if not line:
            del self._lines[person]
        report, theirs = -1, -1
        try:
            report, theirs = os.pipe2(os.O_CLOEXEC)
            pid = os.fork()
        except OSError as error:
            for fd in (report, theirs):
                if fd >= 0:
                    os.close(fd)
            self._refuse(connection, uid, LATER, f"no process can be started ({error.strerror}): try again later")
            self._starting.at(time.monotonic() + _AGAIN)
            return
        if pid == 0:
            _in_child(connection, theirs, self._make_system, self._get_rules)
        os.close(theirs)
        child = self._children[person] = _Child(connection, person, uid, pid, report)
        self._loop.add(_Descriptor(child.pidfd), functools.partial(self._on_end, child), URGENT)
        self._loop.timer(functools.partial(self._expire, child)).at(time.monotonic() + self._deadline)

    def _expire(self, child: _Child, now: float) -> None:
        """Kills a child at its deadline, and answers in its place."""
        if self._children.get(child.person) is not child:
            return
        child.killed = True
        os.kill(child.pid, signal.SIGKILL)
        why = f"not done within {self._deadline:g} s: one of the filesystems does not answer"
        self._refuse(child.connection, child.uid, LATER, why)
        for connection, uid in self._lines.pop(child.person, ()):
            self._refuse(connection, uid, LATER, why)

    def _on_end(self, child: _Child) -> None:
        self._loop.remove(_Descriptor(child.pidfd))
        os.close(child.pidfd)
        _, status = os.waitpid(child.pid, 0)
        data = _read_report(child.report)
        del self._children[child.person]
        if child.killed:
            pass  # answered already
        elif (events := _events_in(data)) is None or status:
            code = os.waitstatus_to_exitcode(status)
            self._log("mount-child-failed", uid=child.uid, status=code)
            self._refuse(
                child.connection, child.uid, FAILED, f"the process that mounts has failed ({code}): try again"
            )
        else:
            child.connection.close()
            for event, fields in events:
                self._log(event, **fields)
        self._start(child.person)
        self._start_all(0.0)

    def _start_all(self, _now: float) -> None:
        for person in tuple(self._lines):
            self._start(person)

    def close(self) -> None:
        """Ends; requests that are being served are given up."""
        self._loop.remove(self._listener)
        self._listener.close()
        unlink_quietly(self._path)
        for child in tuple(self._children.values()):
            self._loop.remove(_Descriptor(child.pidfd))
            if not select.select([child.pidfd], [], [], 1.0)[0]:
                os.kill(child.pid, signal.SIGKILL)
            child.connection.close()
        for line in self._lines.values():
            for connection, _ in line:
                connection.close()


class _Descriptor:
    """A number of a descriptor, for the loop."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd


def _read_report(fd: int) -> bytes:
    with os.fdopen(fd, "rb") as file:
        return file.read(_MAX_REPORT)


def _events_in(report: bytes) -> list[tuple[str, dict[str, Any]]] | None:
    """Returns the events of a child's report; None if it is not whole."""
    try:
        return [(str(event), dict(fields)) for event, fields in json.loads(report)]
    except (ValueError, TypeError):
        return None


def _answer(connection: socket.socket, reply: MountReply) -> None:
    with contextlib.suppress(OSError):  # the requester has ended, or reads nothing
        connection.send(pack_reply(reply), socket.MSG_DONTWAIT)


# --- in the child ------------------------------------------------------------------------------------------------


def _in_child(
    connection: socket.socket, report: int, make_system: MakeSystem, get_rules: Callable[[], MountRules]
) -> NoReturn:
    """Serves one request and ends; never returns into the parent's code. Its log events go through the pipe."""
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # a mount is finished once it was begun; the parent has a deadline
        events = _serve(connection, make_system, get_rules)
        os.write(report, json.dumps(events).encode()[:_MAX_REPORT])
        status = 0
    except BaseException as error:  # noqa: BLE001 - the parent answers
        frames = traceback.extract_tb(error.__traceback__, -1)
        where = f"{frames[0].filename}:{frames[0].lineno}" if frames else "?"
        os.write(2, f"{type(error).__name__} at {where}\n".encode())
    finally:
        os._exit(status)


def _serve(
    connection: socket.socket, make_system: MakeSystem, get_rules: Callable[[], MountRules]
) -> list[tuple[str, dict[str, Any]]]:
    """Answers the request of a connection. Returns events for the log."""
    uid = ucred.of_peer(connection).uid
    about: dict[str, Any] = {"uid": uid}
    try:
        requester = requester_of(connection)
        request, folders, sender = _received(connection)
        about |= {"name": request.name}
        check(requester, sender)
        allowed = get_rules()
        if request.kind == MOUNT:  # what is mounted can be taken away by users who may not mount any more
            check_allowed(uid, allowed)
        path = Mounter(make_system(), allowed.max).serve(request, requester, folders)
    except Denied as denied:
        _answer(connection, MountReply(denied.status, str(denied)))
        return [("mount-refused", {**about, "why": str(denied)[:_SHOWN]})]
    except ConfigError as error:
        text = "the configuration of this machine is faulty: the administrator finds it by `upcall config check`"
        _answer(connection, MountReply(MISCONFIGURED, text))
        return [("mount-refused", {**about, "why": str(error)[:_SHOWN]})]
    _answer(connection, MountReply(0, path))
    event = "unmounted" if request.kind == UNMOUNT else "mounted"
    return [(event, {**about, "point": path[:_SHOWN]})]


def _received(connection: socket.socket) -> tuple[MountRequest, list[int], ucred.Credentials | None]:
    """Returns the request, its descriptors and its sender, once the requester has closed its side: then it has closed
    its own copies of the descriptors, too, which would keep a mount busy."""
    connection.settimeout(_ARRIVAL)
    try:
        data, folders, sender = receive(connection, MAX_REQUEST, max(DESCRIPTORS.values()))
        request = take_request(data)
        if connection.recv(1):
            raise Denied(WRONG, "there is more than one request on the connection")
    except PeerError as error:
        raise Denied(WRONG, f"the request is malformed ({error}): is `upcall mount` of another version?") from None
    except OSError as error:
        raise Denied(WRONG, f"no request has come: {error.strerror or error}") from None
    if len(folders) != DESCRIPTORS[request.kind]:
        raise Denied(WRONG, f"the request has {len(folders)} descriptors, not {DESCRIPTORS[request.kind]}")
    return request, folders, sender


# --- the process -------------------------------------------------------------------------------------------------


class MountProcess(LoopProcess):
    """Runs a source until `stop`. A request that is being served then is given up."""

    ready = "mounting for users"

    def __init__(
        self,
        place: Place,
        make_system: MakeSystem,
        get_rules: Callable[[], MountRules] = rules,
        manager: Manager | None = None,
        log: EventLog | None = None,
        deadline: float = _DEADLINE,
    ) -> None:
        super().__init__(log or EventLog("upcall-mount"), manager)
        self._source = MountSource(self.loop, place, self.log, make_system, get_rules, deadline)

    def close_source(self) -> None:
        self._source.close()


def main(settings: MountSettings, faults: Sequence[Fault] = ()) -> None:
    """Runs the source in this process until SIGTERM, SIGINT or SIGHUP. OSError, UsageError, ConfigError before it is
    ready. `faults`: files that others could change, for the log."""
    if os.geteuid() != 0:
        raise UsageError("only root can mount: run it as root")
    harden()
    raise_descriptor_limit()
    place = own_place(settings.folder) if settings.folder else Place(own_folder(SYSTEM_FOLDER, 0o755))
    working = own_folder(place.folder / WORKING_FOLDER, 0o700)
    warm()
    hardened = of_mount_source(config.settings("hardening").get("broker", True))
    process = MountProcess(place, functools.partial(System, working), manager=Manager())
    process.heed_signals()
    process.log("privileges-dropped", **hardened._asdict())
    log_faults(faults, process.log)
    gc.freeze()
    process.run()


def warm() -> None:
    """Imports what children need, which can import nothing, and does it once in each child's way."""
    rules()
    with contextlib.suppress(Denied):
        check_allowed(0, MountRules(("@",)))
    json.dumps([("", {"text": "é"})])

"""What pam_exec(8) runs when a session is opened or closed, `python -I -m upcall.install.sessions open|close
[also=SERVICE]`; and what the broker runs for a request whose user has no daemon: `start UID`.

A login never fails by us and never waits for us longer than PATIENCE: the work is done by a forked child, which goes
on alone if it is slow (a user directory that hangs, say). Source: pam_exec(8).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Mapping
from typing import Final, NamedTuple, NoReturn

from upcall.core.errors import UpcallError

PATIENCE: Final = 1.5  # seconds; Python's own start comes on top
_AT_MOST: Final = 30  # seconds for the child
_TYPES: Final = {"open": "open_session", "close": "close_session"}
# Who runs at night has nobody logged in; and user managers have units.
PASSED_OVER: Final = frozenset({"cron", "crond", "atd", "anacron", "systemd-user"})


class SessionEvent(NamedTuple):
    """What PAM says."""

    verb: str  # "open" or "close"
    user: str
    service: str


def take(arguments: list[str], environment: Mapping[str, str]) -> SessionEvent | None:
    """What is to be done; None if this is a session that is passed over. ValueError if it is not PAM who asks."""
    verb = arguments[0] if arguments else ""
    if verb not in _TYPES:
        raise ValueError("usage: open|close [also=SERVICE ...], start UID")
    if environment.get("PAM_TYPE") != _TYPES[verb]:
        raise ValueError(f"to be run by pam_exec with type={_TYPES[verb]}")
    user, service = environment.get("PAM_USER", ""), environment.get("PAM_SERVICE", "")
    if not 0 < len(user) <= 256 or not user.isprintable() or set(user) & set("/: "):
        raise ValueError("PAM_USER holds no user's name")
    also = {one.removeprefix("also=") for one in arguments[1:]}
    return None if service in PASSED_OVER - also else SessionEvent(verb, user, service)


def work(asked: SessionEvent, application: int) -> None:
    """`application`: the process that opens or closes the session. Root's daemon is the machine's, and not counted."""
    import pwd

    from upcall.install.sessions.records import Records, process
    from upcall.install.sessions.starting import start

    user = pwd.getpwnam(asked.user)
    who = process(application)
    if user.pw_uid == 0 or who is None:
        return
    records = Records()
    with records.held():
        records.sweep()
        if asked.verb == "open":
            records.opened(user.pw_uid, who, lambda: start(user))
        else:
            records.closed(user.pw_uid, who)


def start_for_request(uid: int, broker: int) -> None:
    """The daemon of somebody who need not be logged in: whoever asks for it counts as a session, until it ends. So it
    stays for the next request, and for the sessions that come. KeyError if there is no such user."""
    import pwd

    from upcall.install.sessions.records import Records, process
    from upcall.install.sessions.starting import start

    user, who = pwd.getpwuid(uid), process(broker)
    if uid == 0 or who is None:
        raise ValueError("root's daemon is the machine's")
    records = Records()
    with records.held():
        records.opened(uid, who, lambda: start(user), once=True)


def _child(asked: SessionEvent, application: int) -> NoReturn:
    """In a session of its own and without the login's descriptors: nothing of it is kept waiting by us."""
    from upcall.install.sessions.starting import tell

    try:
        signal.alarm(_AT_MOST)
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.chdir("/")
        os.umask(0o022)
        work(asked, application)
    except BaseException as error:  # noqa: BLE001 - a child must not return into its parent's code
        tell(f"{asked.verb} for {asked.user!r} by {asked.service!r}: {type(error).__name__}: {error}")
    finally:
        os._exit(0)


def run(arguments: list[str]) -> int:
    if len(arguments) == 2 and arguments[0] == "start" and arguments[1].isdecimal():
        return _start(int(arguments[1]))
    try:
        asked = take(arguments, os.environ)
        if os.geteuid() != 0:
            raise ValueError("to be run by root; pam_exec wants the option seteuid")
    except ValueError as error:
        print(f"upcall session: {error}", file=sys.stderr)  # noqa: T201
        return os.EX_USAGE
    if asked is None:
        return 0
    try:
        application, pid = os.getppid(), os.fork()
        if pid == 0:
            _child(asked, application)
        select.select([os.pidfd_open(pid)], [], [], PATIENCE)
    except OSError as error:
        from upcall.install.sessions.starting import tell

        tell(f"{asked.verb} for {asked.user!r}: {error}")
    return 0


def _start(uid: int) -> int:
    try:
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))  # the broker's own is no daemon's concern
        os.umask(0o022)
        start_for_request(uid, os.getppid())
    except (OSError, UpcallError, KeyError, ValueError) as error:
        print(f"upcall session: uid {uid}: {error}", file=sys.stderr)  # noqa: T201
        return os.EX_UNAVAILABLE
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))

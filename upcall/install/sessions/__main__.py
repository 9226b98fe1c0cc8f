"""Runs for PAM when a session is opened or closed, and for the broker when a request's user has no daemon.

    python -I -m upcall.install.sessions open|close [also=SERVICE]      by pam_exec(8)
    python -I -m upcall.install.sessions start UID                      by the broker

A login never fails because of this program and never waits longer than PATIENCE: a forked child does the work, and
continues alone if it is slow (if a user directory hangs, for example). Source: pam_exec(8).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Mapping
from typing import Final, NamedTuple, NoReturn

from upcall.core.errors import UpcallError, error_words

PATIENCE: Final = 1.5  # seconds, without Python's start-up
_AT_MOST: Final = 30  # seconds, the time-out of the child
_TYPES: Final = {"open": "open_session", "close": "close_session"}
# Services without a person: scheduled jobs; and the user manager, whose daemons are started by units.
PASSED_OVER: Final = frozenset({"cron", "crond", "atd", "anacron", "systemd-user"})


class SessionEvent(NamedTuple):
    """A session's opening or closing, as reported by PAM."""

    verb: str  # "open" or "close"
    user: str
    service: str


def take(arguments: list[str], environment: Mapping[str, str]) -> SessionEvent | None:
    """Parses arguments and environment; None if the session is ignored. ValueError if PAM has not started this
    process."""
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
    """Counts or uncounts a session, and starts or ends the user's daemon. `application`: the process that opens or
    closes the session. Root's sessions are ignored: its daemon is the machine's."""
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
    """Starts the daemon of a user who need not be logged in. The broker counts as a session until it ends, so the
    daemon stays for later requests and sessions. KeyError if there is no such user."""
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
    """Does the work in a session of its own, without the login's descriptors, so that the login need not wait."""
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
    """Runs the command. Returns the exit status."""
    if len(arguments) == 2 and arguments[0] == "start" and arguments[1].isdecimal():
        return _start(int(arguments[1]))
    try:
        asked = take(arguments, os.environ)
        if os.geteuid() != 0:
            raise ValueError("to be run by root; pam_exec needs the option seteuid")
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

        tell(f"{asked.verb} for {asked.user!r}: {error_words(error)}")
    return 0


def _start(uid: int) -> int:
    try:
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))  # daemons must not inherit the broker's policy
        os.umask(0o022)
        start_for_request(uid, os.getppid())
    except (OSError, UpcallError, KeyError, ValueError) as error:
        why = "there is no user of this uid" if isinstance(error, KeyError) else error_words(error)
        print(f"upcall session: uid {uid}: {why}", file=sys.stderr)  # noqa: T201
        return os.EX_UNAVAILABLE
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))

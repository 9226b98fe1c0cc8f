"""Says of a key whether it is open, locked, added: by the user keyring, and by the daemon's status."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from upcall.core.errors import UpcallError
from upcall.kernel import keyring
from upcall.protocols.ecryptfs.lock_cause import cause_in_words, since

OPEN: Final = "open"  # in the daemon's memory
READY: Final = "ready"  # it opens with the next request; a key in a token may need a PIN then
LOCKED: Final = "locked"
MISSING: Final = "passphrase missing"  # it is asked for with the next request
NOT_ADDED: Final = "not added"  # to the user keyring
NO_DAEMON: Final = "no daemon"
STATES: Final = (OPEN, READY, LOCKED, MISSING, NOT_ADDED, NO_DAEMON)


class KeyState(NamedTuple):
    """A key's state. `cause`, `since`: of its lock; since in seconds since the epoch."""

    state: str
    cause: str = ""
    since: float = 0.0

    def __str__(self) -> str:
        if not self.cause:
            return self.state
        when = f" {since(self.since)}" if self.since else ""
        return f"{self.state}{when} ({cause_in_words(self.cause)})"

    def as_json(self) -> dict[str, object]:
        """Returns the entries for a command's JSON output."""
        locked = {"cause": self.cause, "since": self.since or None} if self.cause else None
        return {"state": self.state, "locked": locked}


Daemon = Mapping[str, Any]  # the daemon's status


def ask_daemon() -> Daemon | None:
    """Returns the status of this user's daemon; None if it does not run, or does not answer."""
    from upcall.process.control import DaemonControl

    try:
        with DaemonControl() as control:
            return control.status()
    except (UpcallError, OSError, ValueError):
        return None


def state_of(
    signature: str,
    source: str | None,
    daemon: Daemon | None,
    find: Callable[[str], int | None] = keyring.find,
) -> KeyState:
    """Returns a key's state. `source`: of its passphrase, as in its entry; None: of a foreign key. `daemon`: the
    daemon's status, None if there is none; parts that an older daemon does not report are passed over."""
    if find(signature) is None:
        return KeyState(NOT_ADDED)
    if daemon is None:
        return KeyState(NO_DAEMON)
    locks = [
        (lock["since"], lock["cause"])
        for lock in daemon.get("locks", ())
        if lock["signature"] == signature or (lock["signature"] is None and signature not in lock["unlocked"])
    ]
    if locks:
        at, cause = min(locks)
        return KeyState(LOCKED, cause, at)
    keys = [key for key in daemon.get("keys", ()) if key.get("signature") == signature]
    if any(key.get("locked") for key in keys):
        return KeyState(LOCKED, "command")
    if any(key.get("open") for key in keys):
        return KeyState(OPEN)
    if source == "ask" and signature not in daemon.get("passphrases", [signature]):
        return KeyState(MISSING)
    return KeyState(READY)

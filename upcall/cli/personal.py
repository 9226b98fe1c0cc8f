"""Says of the user's own keys and daemon how they are, in a few lines."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

from upcall.cli import for_terminal
from upcall.cli.keyshow import in_words, row_of
from upcall.cli.keystate import LOCKED, MISSING, NO_DAEMON, NOT_ADDED, STATES, ask_daemon
from upcall.cli.remedies import start_of_daemon
from upcall.core.errors import UpcallError
from upcall.keys.store import KeyStore
from upcall.protocols.ecryptfs.lock_cause import since

# By state: what helps, for one key and for several.
_HELPS: Final = {
    LOCKED: ("`upcall unlock {name}`", "`upcall unlock`"),
    MISSING: ("`upcall unlock {name}`", "`upcall unlock`"),
    NOT_ADDED: ("`upcall key add {name}`", "`upcall key add NAME`"),
}


def look() -> dict[str, Any]:
    """Returns the user's keys and daemon, as plain data: the same as `upcall status --json` has under "you"."""
    daemon = ask_daemon()
    rows, unreadable = [], 0
    store = KeyStore()
    for name in _names(store):
        try:
            rows.append(row_of(store.load(name), daemon))
        except (UpcallError, OSError):
            unreadable += 1
    shown = (
        None if daemon is None else {name: daemon.get(name) for name in ("pid", "since", "version", "last_refusal")}
    )
    return {"uid": os.getuid(), "keys": rows, "unreadable": unreadable, "daemon": shown}


def _names(store: KeyStore) -> list[str]:
    try:
        return store.names()
    except (UpcallError, OSError):
        return []  # of another user, or not readable: `upcall key list` tells


def lines(own: Mapping[str, Any], broker: Mapping[str, Any] | None, tables: bool = False) -> Iterator[str]:
    """Yields lines for people. `own`: what `look` returned; `broker`: the broker's status, None if there is none.
    `tables`: the broker's tables follow, with its pid."""
    rows = own["keys"]
    yield _keys(rows) if rows else "no keys: `upcall key generate` makes one"
    if own["unreadable"]:
        yield f"{own['unreadable']} more cannot be read: `upcall key list` says why"
    yield from _help(rows)
    yield _daemon(own, broker)
    if broker is not None and not tables:
        whose = "yours" if broker["broker"]["uid"] == own["uid"] and own["uid"] else "the system's"
        yield f"broker: pid {broker['broker']['pid']}, {whose}"


def _keys(rows: list[dict[str, Any]]) -> str:
    """Returns how many keys there are in each state; of locks, since when and by what."""
    counts: dict[str, int] = {}
    for row in sorted(rows, key=lambda row: STATES.index(row["state"])):
        words = "without a daemon" if row["state"] == NO_DAEMON else in_words(row)
        counts[words] = counts.get(words, 0) + 1
    total = f"{len(rows)} {'key' if len(rows) == 1 else 'keys'}"
    return f"{total}: " + ", ".join(f"{count} {words}" for words, count in counts.items())


def _help(rows: list[dict[str, Any]]) -> Iterator[str]:
    for state, (one, several) in _HELPS.items():
        names = [row["name"] for row in rows if row["state"] == state]
        if names:
            command = one.format(name=names[0]) if len(names) == 1 else several
            yield f"  {state}: {', '.join(names)}; {command} helps"


def _daemon(own: Mapping[str, Any], broker: Mapping[str, Any] | None) -> str:
    daemon = own["daemon"]
    if daemon is None:
        return f"no daemon: start it: {start_of_daemon()}"
    text = f"daemon: pid {daemon['pid']}" + (f", {since(daemon['since'])}" if daemon["since"] else "")
    if broker is not None and daemon["pid"] not in [one["pid"] for one in broker["daemons"]]:
        text += ", not registered with this broker"
    if last := daemon["last_refusal"]:
        at = time.strftime("%H:%M", time.localtime(last["at"]))
        why = f": {last['why']}" if last["why"] else ""
        text += f"; last refusal at {at} ({last['service']}): {last['reason']}{why}"
    return for_terminal(text)

"""Checks the kernel's keyrings of this process and its user."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from upcall.kernel import keyring
from upcall.observe.doctor.findings import Finding, note, ok, problem
from upcall.observe.doctor.system import Scene

_FULL = 0.9  # of a limit

# add_key(2), KEY_USERS: "uid: usage nkeys/nikeys qnkeys/maxkeys qnbytes/maxbytes" in /proc/key-users
_USERS = "/proc/key-users"


def reachable(scene: Scene) -> Iterator[Finding]:
    """Checks the user keyring, which holds auth tokens, and the session keyring, through which programs find it."""
    try:
        count = len(keyring.list_user_keyring())
    except OSError as error:
        yield problem(f"the user keyring cannot be read: {error.strerror}", "log in again")
        return
    yield ok(f"the user keyring is there, with {count} key{'s' if count != 1 else ''}")
    try:
        linked = keyring.user_keyring_is_linked()
    except OSError as error:
        if error.errno not in (errno.EKEYREVOKED, errno.EKEYEXPIRED):
            raise
        gone = "revoked" if error.errno == errno.EKEYREVOKED else "expired"
        yield problem(f"the session keyring is {gone}", "log in again, or have a new one", "keyctl new_session")
        return
    if linked:
        yield ok("the session keyring leads to the user keyring")
    else:
        why = "the session keyring does not lead to the user keyring: mount helpers find no auth tokens"
        yield note(why, "link it; upcall itself needs no link", "keyctl link @u @s")


def room(scene: Scene) -> Iterator[Finding]:
    """Checks how much of the kernel's limits for this user's keys is used."""
    uid = os.getuid()
    for line in scene.text(_USERS).splitlines():
        who, _, figures = line.partition(":")
        fields = figures.split()
        if who.strip() != str(uid) or len(fields) != 4:
            continue
        for title, field, name in (("keys", fields[2], "maxkeys"), ("bytes of keys", fields[3], "maxbytes")):
            used, _, most = field.partition("/")
            if not used.isdigit() or not most.isdigit():
                continue
            limit = f"kernel.keys.root_{name}" if uid == 0 else f"kernel.keys.{name}"
            if int(used) >= _FULL * int(most):
                what = f"{used} of {most} {title} of uid {uid} are used: soon there is no room for auth tokens"
                yield problem(what, "as root, or unlink keys", f"sysctl -w {limit}={max(2 * int(most), 200)}")
            else:
                yield ok(f"{used} of {most} {title} are used")

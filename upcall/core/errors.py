"""Errors, by the party at fault.

`PeerError`     the kernel, a daemon, a requester or a file delivered malformed bytes.
`UsageError`    the caller passed a wrong name or size, or asked for a key that does not exist.
`Refused`       a request is well-formed and not granted; it carries the reason, which is counted, and the errno.
`ModuleFailed`  a key module or handler could not carry out a well-formed request.

None of them carries key material: messages contain lengths, offsets and names only.
"""

from __future__ import annotations

import errno

from upcall.core.reasons import REASONS as _REASONS
from upcall.core.reasons import described


class UpcallError(Exception):
    """The root of every error that upcall raises on purpose."""


class PeerError(UpcallError):
    """Malformed bytes from outside. `what`: the structure, `why`: the fault, `where`: its offset in bytes."""

    def __init__(self, what: str, why: str, where: int | None = None) -> None:
        self.what, self.why, self.where = what, why, where
        super().__init__(f"{what}: {why}" if where is None else f"{what}: {why} at byte {where}")


class UsageError(UpcallError):
    """The caller asked for something that does not exist or is not possible."""


class ModuleFailed(UpcallError):
    """A key module or handler could not carry out a request. The text is shown to people: no secrets in it."""


# reason -> errno. Outcomes are counted by reason. An unknown reason from a newer peer is passed on unchanged.
REASONS: dict[str, int] = {name: reason.errno for name, reason in _REASONS.items()}


class Refused(UpcallError):
    """A request is well-formed and not granted. `reason`: one of REASONS. `code`: the errno; by default that of the
    reason, EIO if the reason is unknown.

    `why`: details, for the log of the refusing process, and for a requester of the same uid as the daemon (at most
    200 bytes of printable UTF-8, docs/protocol.md). No secrets in it. From a daemon it is that daemon's own text.
    `key`: the name or signature of the key that was asked for; `by`: the process whose words `why` is, if it is
    another one. Both for the text only; "" if unknown.

    The text says what is wrong and what helps, with the reason in parentheses (docs/refusals.md).
    """

    def __init__(self, reason: str, code: int | None = None, why: str = "") -> None:
        self.reason, self.why = reason, why
        self.key = self.by = ""
        self.errno = REASONS.get(reason, errno.EIO) if code is None else code
        super().__init__(reason)

    def __str__(self) -> str:
        return described(self.reason, self.why, self.by, self.key)


def error_words(error: BaseException) -> str:
    """Returns what went wrong in words for people: without the number of an OSError, with its file if it concerns
    one."""
    if isinstance(error, OSError) and error.strerror:
        name = error.filename
        if name is None or isinstance(name, int):  # a descriptor's number says nothing to people
            return error.strerror
        return f"{name.decode('utf-8', 'surrogateescape') if isinstance(name, bytes) else name}: {error.strerror}"
    return str(error)

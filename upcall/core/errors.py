"""Errors, by the party at fault.

`PeerError`     the kernel, a daemon, a requester or a file delivered malformed bytes.
`UsageError`    the caller passed a wrong name or size, or asked for a key that does not exist.
`Refused`       a request is well-formed and not granted; it carries the reason, which is counted, and the errno.
`ModuleFailed`  a key module or handler could not carry out a well-formed request.

None of them carries key material: messages contain lengths, offsets and names only.
"""

from __future__ import annotations

import errno


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


# reason -> errno. Reasons are part of the protocol (docs/protocol.md). Outcomes are counted by reason. An unknown
# reason from a newer peer is passed on unchanged.
REASONS: dict[str, int] = {
    "no-daemon": errno.ENOTCONN,  # no daemon is registered for this uid
    "too-many-daemons": errno.EUSERS,  # the limit of registered daemons is reached, in total or per person ([broker])
    "no-context": errno.ENOMEM,  # every message context of this service is in use, as in the kernel
    "daemon-gone": errno.ECONNRESET,  # the daemon exited or was killed before it replied
    "daemon-full": errno.EAGAIN,  # the daemon's socket buffer is full: it is stopped or overloaded
    "timed-out": errno.ETIMEDOUT,  # time-out: no reply within the service's patience
    "closing": errno.ESHUTDOWN,  # the broker or the daemon is shutting down
    "bad-request": errno.EBADMSG,  # the request is malformed
    "bad-answer": errno.EPROTO,  # the daemon's answer failed the check of its service
    "no-service": errno.EOPNOTSUPP,  # no handler for a service of this name
    "not-permitted": errno.EPERM,  # an ordinary user asked for another uid's daemon
    "no-key": errno.ENOKEY,  # no auth token with this signature in the user's keyring
    "bad-token": errno.EKEYREJECTED,  # the key of this description is not an auth token for it
    "no-module": errno.ENOPKG,  # the auth token names a key module that is not installed
    "locked": errno.EKEYREVOKED,  # the key's passphrase is not at hand
    "prompting": errno.EAGAIN,  # a prompt is open; a retry after it succeeds
    "pin-refused": errno.EKEYREJECTED,  # too many wrong PINs: no more prompts, so that retries do not lock the token
    "no-name-server": errno.ECONNREFUSED,  # no name server replied in time
    "name-server-failed": errno.EAGAIN,  # name servers replied with a failure or a refusal
    "no-such-name": errno.ENOENT,  # no name service knows this name or number
    "no-name-service": errno.ECONNREFUSED,  # the name service is not running or not installed
    "name-service-silent": errno.ETIMEDOUT,  # the name service did not answer in time
    # Kerberos (cifs.spnego). mount(2) returns these errnos; docs/cifs.md lists what other system calls return.
    "no-ticket": errno.ENOKEY,  # the user has no usable credential cache or keytab
    "ticket-expired": errno.EKEYEXPIRED,  # the ticket, the account or the password has expired
    "cache-refused": errno.EACCES,  # every cache could have been planted by another user, or is accessible to one
    "unknown-service": errno.EKEYREJECTED,  # the realm has no such file server
    "wrong-realm": errno.EKEYREJECTED,  # no cross-realm path to the server's realm
    "clock-skew": errno.EKEYREJECTED,  # the difference between this clock and the KDC's is too large
    "kdc-unreachable": errno.EAGAIN,  # no KDC of the realm replied
    "kdc-refused": errno.EKEYREJECTED,  # the KDC refused for another reason, which is in the log
    "no-mechanism": errno.EKEYREJECTED,  # sec= asks for a mechanism that is not implemented
    "no-library": errno.ENOPKG,  # the Kerberos library is not installed
    "module-failed": errno.EIO,  # the key module raised ModuleFailed
    "module-broke": errno.EFAULT,  # the key module raised another exception, or returned a wrong type
    "module-off": errno.EAGAIN,  # circuit breaker: its process failed several times; not restarted for seconds
    "unknown-type": errno.ENOPKG,  # no handler for keys of this type
    "forged": errno.EACCES,  # not made by the kernel, or with a description that the kernel never writes
    "duplicate": errno.EALREADY,  # the same key is already being instantiated
    "requester-gone": errno.ESRCH,  # the requesting process has exited
    "own-request": errno.EDEADLK,  # self-deadlock: the daemon or one of its children would wait for the daemon
    "busy": errno.EBUSY,  # every slot of this key is occupied by a call that does not return
}


class Refused(UpcallError):
    """A request is well-formed and not granted. `reason`: one of REASONS. `code`: the errno; by default that of the
    reason, EIO if the reason is unknown.

    `why`: details, for the log of the refusing process, and for a requester of the same uid as the daemon (at most
    200 bytes of printable UTF-8, docs/protocol.md). No secrets in it. From a daemon it is that daemon's own text.
    """

    def __init__(self, reason: str, code: int | None = None, why: str = "") -> None:
        self.reason, self.why = reason, why
        self.errno = REASONS.get(reason, errno.EIO) if code is None else code
        super().__init__(reason)

"""Errors, by who is at fault.

`PeerError`     somebody sent us nonsense (the kernel, a daemon, a requester): a broken frame, packet or file.
`UsageError`    the caller misused us: a wrong name, a wrong size, a missing key.
`Refused`       a request was understood and not granted; it carries the reason that is counted and the errno.
`ModuleFailed`  a key module or handler was asked properly and could not.

None of them ever carries key material: messages name lengths, offsets and names only.
"""

from __future__ import annotations

import errno


class UpcallError(Exception):
    """The root of every error that upcall raises on purpose."""


class PeerError(UpcallError):
    """Bytes from outside that do not mean anything. `what` names the shape, `where` the offset in bytes."""

    def __init__(self, what: str, why: str, where: int | None = None) -> None:
        self.what, self.why, self.where = what, why, where
        super().__init__(f"{what}: {why}" if where is None else f"{what}: {why} at byte {where}")


class UsageError(UpcallError):
    """The caller asked for something that cannot be."""


class ModuleFailed(UpcallError):
    """A key module could not do what it was asked. The text is shown to people: no secrets in it."""


# reason -> errno. The reasons are words of the protocol (docs/protocol.md): they are counted by them, and
# an unknown one from a newer peer is kept as it is.
REASONS: dict[str, int] = {
    "no-daemon": errno.ENOTCONN,  # nobody is registered for this uid
    "too-many-daemons": errno.EUSERS,  # as many are registered as may be, in all or of one person ([broker])
    "no-context": errno.ENOMEM,  # every message context of this service is in use, as in the kernel
    "daemon-gone": errno.ECONNRESET,  # it exited, or was killed, with the request in its hands
    "daemon-full": errno.EAGAIN,  # its socket takes no more: it is stopped or hopelessly behind
    "timed-out": errno.ETIMEDOUT,  # nobody answered within the service's patience
    "closing": errno.ESHUTDOWN,  # the broker or the daemon is going down
    "bad-request": errno.EBADMSG,  # the request itself makes no sense
    "bad-answer": errno.EPROTO,  # the daemon's answer failed the check of its service
    "no-service": errno.EOPNOTSUPP,  # nobody here serves that name
    "not-permitted": errno.EPERM,  # an ordinary user asked for another uid's daemon
    "no-key": errno.ENOKEY,  # no auth token with this signature in the user's keyring
    "bad-token": errno.EKEYREJECTED,  # what stands there under the signature is no auth token of it
    "no-module": errno.ENOPKG,  # the auth token names a key module that is not installed
    "locked": errno.EKEYREVOKED,  # the key's passphrase is not at hand
    "prompting": errno.EAGAIN,  # a person is being asked; the next try finds the answer
    "pin-refused": errno.EKEYREJECTED,  # too many wrong PINs: nobody is asked any more, so that the token lives
    "no-name-server": errno.ECONNREFUSED,  # no name server says anything in time
    "name-server-failed": errno.EAGAIN,  # they do, but that they cannot or will not
    "no-such-name": errno.ENOENT,  # no name service knows this name or number
    "no-name-service": errno.ECONNREFUSED,  # the service that could know it is not running or not installed
    "name-service-silent": errno.ETIMEDOUT,  # it does not answer in time
    # Kerberos (cifs.spnego). mount(2) has them all as they are; docs/cifs.md says what others see.
    "no-ticket": errno.ENOKEY,  # no credential cache or keytab of the user's that could be used
    "ticket-expired": errno.EKEYEXPIRED,  # there was one; or the account or the password has expired
    "cache-refused": errno.EACCES,  # the only ones there could have been planted, or are open to others
    "unknown-service": errno.EKEYREJECTED,  # the realm does not know this file server
    "wrong-realm": errno.EKEYREJECTED,  # no ticket leads to the server's realm
    "clock-skew": errno.EKEYREJECTED,  # the clock here and the KDC's are too far apart
    "kdc-unreachable": errno.EAGAIN,  # no KDC of the realm answers
    "kdc-refused": errno.EKEYREJECTED,  # the KDC gives no ticket for another reason: the log has its words
    "no-mechanism": errno.EKEYREJECTED,  # sec= asks for one that nobody here speaks
    "no-library": errno.ENOPKG,  # the Kerberos library is not installed
    "module-failed": errno.EIO,  # the key module said that it cannot
    "module-broke": errno.EFAULT,  # the key module raised something else, or returned nonsense
    "module-off": errno.EAGAIN,  # its process broke several times in a row: it is left alone for a few seconds
    "unknown-type": errno.ENOPKG,  # a key of a type that nobody here knows
    "forged": errno.EACCES,  # an upcall that the kernel did not make, or whose description is none of its own
    "duplicate": errno.EALREADY,  # the same key is being answered
    "requester-gone": errno.ESRCH,  # the process that waited for it has ended
    "own-request": errno.EDEADLK,  # the daemon, or one of its children, would wait for the daemon
    "busy": errno.EBUSY,  # every slot of this key is taken by calls that do not come back
}


class Refused(UpcallError):
    """A request that was understood and is not granted, with its reason (one of REASONS) and errno.

    `why` is for the log of whoever refuses, and goes no further: no secrets in it.
    """

    def __init__(self, reason: str, code: int | None = None, why: str = "") -> None:
        self.reason, self.why = reason, why
        self.errno = REASONS.get(reason, errno.EIO) if code is None else code
        super().__init__(reason)

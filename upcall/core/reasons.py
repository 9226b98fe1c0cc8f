"""The reasons of refusals: errno, exit code, words and remedy of each. Pure.

Reasons are part of the protocol (docs/protocol.md); people see them with these words (docs/refusals.md).
"""

from __future__ import annotations

import errno
from typing import Final, NamedTuple

# Exit codes of sysexits.h. EX_TEMPFAIL only where the same command may succeed later, without a person's help.
DATAERR, NOHOST, UNAVAILABLE, SOFTWARE, TEMPFAIL, PROTOCOL, NOPERM, CONFIG = 65, 68, 69, 70, 75, 76, 77, 78


class Reason(NamedTuple):
    """What a reason means. `errno`: for kernel interfaces. `exit`: of a command that is refused. `words`: what is
    wrong; `{named}` stands for a blank and the key's name, if it is known. `remedy`: what helps, with the command;
    `{key}` stands for the key's name, `{daemon}` for the command that starts the user's daemon."""

    errno: int
    exit: int
    words: str
    remedy: str


_AGAIN: Final = "try again"
REASONS: Final[dict[str, Reason]] = {
    # --- the broker's ---
    "no-daemon": Reason(
        errno.ENOTCONN, UNAVAILABLE, "no daemon of this user is registered with the broker", "start it: {daemon}"
    ),
    "too-many-daemons": Reason(
        errno.EUSERS,
        UNAVAILABLE,
        "the limit of registered daemons is reached",
        "raise [broker] daemons-per-person or daemons: `upcall config show` has their values",
    ),
    "no-context": Reason(
        errno.ENOMEM,
        TEMPFAIL,
        "too many requests of this user are pending",
        f"{_AGAIN}; `upcall status --all` shows what is pending",
    ),
    "daemon-gone": Reason(
        errno.ECONNRESET,
        TEMPFAIL,
        "the daemon ended before it answered",
        f"{_AGAIN}; `upcall status` shows whether it runs",
    ),
    "daemon-full": Reason(
        errno.EAGAIN,
        TEMPFAIL,
        "the daemon takes no requests: it is stopped or overloaded",
        f"{_AGAIN}; `upcall doctor` checks it",
    ),
    "timed-out": Reason(
        errno.ETIMEDOUT, TEMPFAIL, "there was no answer in time", f"{_AGAIN}; `upcall doctor` looks for the cause"
    ),
    "closing": Reason(
        errno.ESHUTDOWN,
        TEMPFAIL,
        "the broker or the daemon is shutting down",
        f"{_AGAIN}; `upcall status` shows whether they run",
    ),
    "bad-request": Reason(
        errno.EBADMSG,
        PROTOCOL,
        "the request is malformed",
        "`upcall doctor` checks whether broker, daemon and commands are of one version",
    ),
    "bad-answer": Reason(
        errno.EPROTO,
        PROTOCOL,
        "the daemon's answer was malformed, and is discarded",
        "`upcall plugin check` checks the plugin that made it",
    ),
    "no-service": Reason(
        errno.EOPNOTSUPP,
        UNAVAILABLE,
        "nothing answers requests of this kind",
        "`upcall plugin list` shows the installed handlers",
    ),
    "not-permitted": Reason(
        errno.EPERM,
        NOPERM,
        "only root may ask another user's daemon",
        "run it as that user; `upcall status` shows your own daemon",
    ),
    "own-request": Reason(
        errno.EDEADLK,
        CONFIG,
        "the daemon would wait for itself (self-deadlock)",
        "keep key files, and what the daemon runs, off the folders that need its keys; `upcall doctor` names them",
    ),
    # --- keys ---
    "no-key": Reason(
        errno.ENOKEY, UNAVAILABLE, "the key{named} is not in the user keyring", "add it: `upcall key add {key}`"
    ),
    "bad-token": Reason(
        errno.EKEYREJECTED,
        DATAERR,
        "what the user keyring has for the key{named} is no auth token of it",
        "replace it: `upcall key add {key}`",
    ),
    "no-module": Reason(
        errno.ENOPKG,
        UNAVAILABLE,
        "the module of the key{named} is not installed, or not allowed",
        "`upcall plugin list` shows the installed ones, `upcall config show` those that are allowed",
    ),
    "locked": Reason(
        errno.EKEYREVOKED,
        NOPERM,
        "the key{named} is locked, or waits for its passphrase or PIN",
        "run `upcall unlock {key}`",
    ),
    "prompting": Reason(
        errno.EAGAIN,
        TEMPFAIL,
        "the daemon is asking for the PIN or passphrase of the key{named}",
        "answer the prompt, here by `upcall prompt`, and try again",
    ),
    "pin-refused": Reason(
        errno.EKEYREJECTED,
        NOPERM,
        "there were too many wrong PINs, and no more are tried, so that the token does not lock itself",
        "with the right PIN: `upcall unlock {key}`",
    ),
    "module-failed": Reason(
        errno.EIO,
        DATAERR,
        "the key module could not use the key{named}, or another key wrapped this",
        "unwrap it with the key that wrapped it; `upcall unlock {key}` tries PIN and passphrase",
    ),
    "module-broke": Reason(
        errno.EFAULT,
        SOFTWARE,
        "the key module has a fault",
        "`upcall plugin check` shows which; the daemon's log has the place",
    ),
    "module-off": Reason(
        errno.EAGAIN,
        TEMPFAIL,
        "the key module's process has failed several times, and is started again in some seconds",
        f"{_AGAIN}; `upcall doctor` checks it",
    ),
    "busy": Reason(
        errno.EBUSY,
        TEMPFAIL,
        "all calls for the key{named} hang",
        f"{_AGAIN}; `upcall lock {{key}}` and `upcall unlock {{key}}` open it again",
    ),
    # --- names (dns_resolver, id_resolver, cifs.idmap) ---
    "no-name-server": Reason(
        errno.ECONNREFUSED,
        TEMPFAIL,
        "no name server answered in time",
        f"{_AGAIN}; `upcall explain dns_resolver --name HOST --contact` shows what they say",
    ),
    "name-server-failed": Reason(
        errno.EAGAIN,
        TEMPFAIL,
        "the name servers answered with a failure or a refusal",
        f"{_AGAIN}; `upcall explain dns_resolver --name HOST --contact` shows what they say",
    ),
    "no-such-name": Reason(
        errno.ENOENT,
        NOHOST,
        "no name service knows this name or number",
        "check it: `upcall explain id_resolver --name user:ID --contact`, or another type of keys",
    ),
    "no-name-service": Reason(
        errno.ECONNREFUSED,
        UNAVAILABLE,
        "the name service does not run, or is not installed",
        "start it (sssd, winbind); `upcall doctor` checks what is needed",
    ),
    "name-service-silent": Reason(
        errno.ETIMEDOUT,
        TEMPFAIL,
        "the name service did not answer in time",
        f"{_AGAIN}; `upcall explain id_resolver --name user:ID --contact` asks it",
    ),
    # --- Kerberos (cifs.spnego). mount(2) returns these errnos; docs/cifs.md lists what other system calls return ---
    "no-ticket": Reason(
        errno.ENOKEY,
        NOPERM,
        "there is no usable ticket or keytab",
        "get one with kinit; `upcall explain cifs.spnego --host HOST` shows where tickets are looked for",
    ),
    "ticket-expired": Reason(
        errno.EKEYEXPIRED,
        NOPERM,
        "the ticket, the account or the password has expired",
        "get a new ticket with kinit; `upcall explain cifs.spnego --host HOST` shows which has expired",
    ),
    "cache-refused": Reason(
        errno.EACCES,
        NOPERM,
        "every ticket cache is accessible to other users, or could have been planted by one",
        "remove it, and run kinit; `upcall explain cifs.spnego --host HOST` names the files",
    ),
    "unknown-service": Reason(
        errno.EKEYREJECTED,
        NOHOST,
        "the Kerberos realm has no such file server",
        "use the server's full name; `upcall explain cifs.spnego --host HOST --contact` asks the KDC",
    ),
    "wrong-realm": Reason(
        errno.EKEYREJECTED,
        CONFIG,
        "there is no path to the server's realm",
        "`upcall explain cifs.spnego --host HOST --contact` shows the realms; krb5.conf maps hosts to them",
    ),
    "clock-skew": Reason(
        errno.EKEYREJECTED,
        CONFIG,
        "this machine's clock differs too much from the KDC's",
        "set the clock; `upcall explain cifs.spnego --host HOST --contact` tries again",
    ),
    "kdc-unreachable": Reason(
        errno.EAGAIN,
        TEMPFAIL,
        "no KDC of the realm answers",
        f"{_AGAIN}; `upcall explain cifs.spnego --host HOST --contact` asks them",
    ),
    "kdc-refused": Reason(
        errno.EKEYREJECTED,
        NOPERM,
        "the KDC has refused",
        "`upcall explain cifs.spnego --host HOST --contact` shows why",
    ),
    "no-mechanism": Reason(
        errno.EKEYREJECTED,
        UNAVAILABLE,
        "sec= asks for a mechanism that upcall does not have",
        "mount with sec=krb5; `upcall explain cifs.spnego --host HOST --sec krb5` shows what would be answered",
    ),
    "no-library": Reason(
        errno.ENOPKG,
        UNAVAILABLE,
        "the Kerberos library is not installed",
        "install MIT Kerberos (Debian: libgssapi-krb5-2); `upcall doctor` checks it",
    ),
    # --- keys that the kernel requests ---
    "unknown-type": Reason(
        errno.ENOPKG,
        UNAVAILABLE,
        "no handler answers keys of this type",
        "`upcall request-key status` shows the types, `upcall plugin list` the handlers",
    ),
    "forged": Reason(
        errno.EACCES,
        NOPERM,
        "the kernel did not make this key, or does not write such a description",
        "`upcall explain cifs.spnego --host HOST` shows what the kernel would write",
    ),
    "duplicate": Reason(
        errno.EALREADY,
        TEMPFAIL,
        "the same key is being answered already",
        f"{_AGAIN}; `upcall status --all` shows what is pending",
    ),
    "requester-gone": Reason(
        errno.ESRCH,
        UNAVAILABLE,
        "the process that needs the key has exited",
        "repeat what it did; `upcall log` shows its request",
    ),
}


def described(reason: str, why: str = "", by: str = "", key: str = "", daemon: str = "`upcall daemon`") -> str:
    """Returns a refusal for people, on one line: what is wrong, the reason in parentheses with `why`, and what helps.

    `by`: the other process whose words `why` is, which are quoted as such. An unknown reason stands alone."""
    if why and by:
        quoted = why.replace('"', "'")
        why = f'; {by} says "{quoted}"'
    elif why:
        why = f": {why}"
    known = REASONS.get(reason)
    if known is None:
        return f"refused ({reason}{why})"
    return f"{in_words(reason, key)} ({reason}{why}): {remedy(reason, key, daemon)}"


def in_words(reason: str, key: str = "") -> str:
    """Returns what is wrong, for one of REASONS. `key`: the name of the key, if there is one and it is known."""
    return REASONS[reason].words.format(named=f" {key}" if key else "")


def remedy(reason: str, key: str = "", daemon: str = "`upcall daemon`") -> str:
    """Returns what helps, for one of REASONS. `key`: as for `in_words`; `daemon`: the command that starts it here."""
    return REASONS[reason].remedy.format(key=key or "NAME", daemon=daemon)


def exit_code(reason: str) -> int:
    """Returns the exit code of a command that is refused for this reason."""
    known = REASONS.get(reason)
    return UNAVAILABLE if known is None else known.exit

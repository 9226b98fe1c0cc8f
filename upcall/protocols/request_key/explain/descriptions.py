"""The keys that a kernel would ask for, from what people know: hosts, uids, names. Pure."""

from __future__ import annotations

import re

from upcall.core.errors import PeerError, UsageError
from upcall.protocols.request_key import cifs_spnego, dns_resolver
from upcall.protocols.request_key.cifs_spnego import Spnego
from upcall.protocols.request_key.conf import RequestedKey

_ANY_PID = 1  # there is no process, and nobody looks for it
_IPV4, _NO_ADDRESS = re.compile(r"[0-9.]{7,15}"), "0.0.0.0"  # noqa: S104 - a place holder in a text


def spnego(host: str, uid: int, sec: str = "krb5", user: str | None = None) -> RequestedKey:
    """For a mount of //host/... with cruid=uid. UsageError for what no kernel would write."""
    ip = host if ":" in host or _IPV4.fullmatch(host) else _NO_ADDRESS
    asked = Spnego(host, ip, sec, 0, uid, user, _ANY_PID, None)
    try:
        return RequestedKey(cifs_spnego.TYPE.encode(), cifs_spnego.pack_description(asked))
    except PeerError as error:
        raise UsageError(f"no kernel would ask for this: {error}") from None


def dns(name: str, options: str = "") -> RequestedKey:
    """For a host by its name, or "afsdb:CELL"; `options` as the kernel gives them, with blanks between. UsageError."""
    try:
        dns_resolver.take_callout(options.encode(), dns_resolver.take_description(name.encode()))
    except PeerError as error:
        raise UsageError(f"no kernel would ask for this: {error}") from None
    return RequestedKey(dns_resolver.TYPE.encode(), name.encode(), options.encode())

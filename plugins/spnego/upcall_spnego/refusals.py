"""Maps errors of MIT's libraries to refusals: a reason, and the errno that mount(2) returns.

Source: krb5/krb5.h and gssapi_krb5's error table (com_err), RFC 4120, 7.5.9.
"""

from __future__ import annotations

from typing import Final

from upcall.core.errors import Refused
from upcall_spnego.gssapi import GssError
from upcall_spnego.krb5 import FCC_NOFILE, realm_of

_KDC = -1765328384  # base of Kerberos's error table: RFC 4120's numbers up to 127, the library's above
_GSS = 39756032  # base of the mechanism's error table

SERVER_UNKNOWN: Final = _KDC + 7  # KDC_ERR_S_PRINCIPAL_UNKNOWN

_REASONS: Final = {
    _KDC + 1: "ticket-expired",  # KDC_ERR_NAME_EXP: the account
    SERVER_UNKNOWN: "unknown-service",
    _KDC + 23: "ticket-expired",  # KDC_ERR_KEY_EXPIRED: the password
    _KDC + 29: "kdc-unreachable",  # KDC_ERR_SVC_UNAVAILABLE
    _KDC + 32: "ticket-expired",  # KRB_AP_ERR_TKT_EXPIRED
    _KDC + 33: "clock-skew",  # KRB_AP_ERR_TKT_NYV: not valid yet
    _KDC + 37: "clock-skew",  # KRB_AP_ERR_SKEW
    _KDC + 68: "wrong-realm",  # KDC_ERR_WRONG_REALM
    _KDC + 141: "no-ticket",  # KRB5_CC_NOTFOUND
    _KDC + 148: "clock-skew",  # KRB5_KDCREP_SKEW
    _KDC + 154: "wrong-realm",  # KRB5_REALM_UNKNOWN: no KDC is configured for it
    _KDC + 156: "kdc-unreachable",  # KRB5_KDC_UNREACH
    _KDC + 181: "no-ticket",  # KRB5_KT_NOTFOUND: the keytab does not hold the key
    FCC_NOFILE: "no-ticket",
    _KDC + 220: "kdc-unreachable",  # KRB5_REALM_CANT_RESOLVE
    _GSS + 0: "no-ticket",  # KG_CCACHE_NOMATCH
    _GSS + 1: "no-ticket",  # KG_KEYTAB_NOMATCH
    _GSS + 2: "no-ticket",  # KG_TGT_MISSING
    _GSS + 5: "no-ticket",  # KG_EMPTY_CCACHE
}


def refused(error: GssError, server: str, client: str, reaches: bool) -> Refused:
    """Returns the refusal for an error. `reaches`: the client now has a ticket for the server's realm. The refusal's
    text is for the daemon's log."""
    reason = _REASONS.get(error.code, "kdc-refused")
    at_home = realm_of(server) in ("", realm_of(client))
    if reason == "unknown-service" and not reaches and not at_home:
        reason = "wrong-realm"  # the client's KDC does not know the way to the server's realm
    if reason == "wrong-realm" and at_home and error.code == _KDC + 154:
        reason = "kdc-unreachable"  # the realm's KDC issued a ticket before, so it is only unreachable now
    return Refused(reason, why=f"{server} for {client}: {error}")

"""Lists the key types that upcall answers. A new type is one file beside these, and one line here. Pure."""

from __future__ import annotations

from typing import Final

from upcall.protocols.request_key import cifs_idmap, cifs_spnego, dns_resolver, id_resolver

KEY_TYPES: Final = {
    key_type.name: key_type
    for key_type in (
        cifs_spnego.KEY_TYPE,
        dns_resolver.KEY_TYPE,
        id_resolver.KEY_TYPE,
        cifs_idmap.KEY_TYPE,
    )
}

# Types whose descriptions name no uid: the configuration selects the daemon.
OF_THE_SYSTEM: Final = frozenset(name for name, key_type in KEY_TYPES.items() if key_type.of_the_system)

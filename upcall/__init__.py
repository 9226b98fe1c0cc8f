"""upcall: a kernel-userspace upcall message broker, shaped like eCryptfs's public-key messaging.

Public names: `Client` sends requests to the caller's daemon; `Refused` carries the reason of a refusal. Key modules
need `upcall.keymodule` and `upcall.core.errors`. Names are imported at their first use, to keep the import small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from upcall.client import Client, NoBroker
    from upcall.core.errors import ModuleFailed, PeerError, Refused, UpcallError, UsageError

__version__ = "0.1.0"
__all__ = ["Client", "ModuleFailed", "NoBroker", "PeerError", "Refused", "UpcallError", "UsageError", "__version__"]

_HOMES = {"Client": "client", "NoBroker": "client"}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'upcall' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"upcall.{_HOMES.get(name, 'core.errors')}"), name)

"""upcall: a kernel-userspace upcall message broker, shaped like eCryptfs's public-key messaging.

Public names: `Client` and `AsyncClient` send requests to the caller's daemon; every error of theirs is an
`UpcallError`; `Refused` carries the reason of a refusal. docs/python.md has examples. Key modules need
`upcall.keymodule` and `upcall.core.errors`. Names are imported at their first use, to keep the import small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from upcall.async_client import AsyncClient
    from upcall.client import Client, NoBroker, TimedOut
    from upcall.core.errors import ModuleFailed, PeerError, Refused, UpcallError, UsageError

__version__ = "0.1.0"
__all__ = [
    "AsyncClient",
    "Client",
    "ModuleFailed",
    "NoBroker",
    "PeerError",
    "Refused",
    "TimedOut",
    "UpcallError",
    "UsageError",
    "__version__",
]

_MODULES = {"AsyncClient": "async_client", "Client": "client", "NoBroker": "client", "TimedOut": "client"}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'upcall' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"upcall.{_MODULES.get(name, 'core.errors')}"), name)


def __dir__() -> list[str]:
    return sorted({*__all__, "__doc__", "__file__", "__name__", "__path__"})

"""What everything that has to know all protocols iterates over: one record for each. Pure."""

from __future__ import annotations

from typing import NamedTuple

from upcall.config.table import Table
from upcall.core.service import Service


class Protocol(NamedTuple):
    """One kind of kernel upcall, or of requests that are served like one."""

    name: str
    services: tuple[Service, ...] = ()  # what the broker is asked for, and by which rules
    tables: tuple[Table, ...] = ()  # of the configuration
    # What doctor looks for in the kernel: (what it then can do, module, option of its configuration)
    kernel: tuple[tuple[str, str, str], ...] = ()

"""Describes eCryptfs to the rest of upcall: its services, configuration and source."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from upcall.core.service import Service
from upcall.protocols.ecryptfs.configuration import TABLES
from upcall.protocols.ecryptfs.packets import check_answer, check_ask
from upcall.protocols.protocol import Given, Protocol

if TYPE_CHECKING:
    from upcall.process.source import MakeSource

# The kernel's time-out is 3 s (ecryptfs_message_wait_timeout). A late answer could reach a context that is in use
# again, so half a second is reserved for the answer. The kernel has 32 contexts (ecryptfs_message_buf_len) for all
# uids together, so some are reserved: one user's hanging key module must not use up all.
ECRYPTFS: Final = Service("ecryptfs", 2.5, 32, 8, check_answer, check_ask, local=False)

# The same packets, requested by processes, which may wait longer than the kernel.
KEY: Final = Service("key", 10.0, 32, 0, check_answer, check_ask, local=True)


def source(given: Given) -> MakeSource | None:
    if given.device is None:
        return None
    from upcall.protocols.ecryptfs.device import Miscdev
    from upcall.protocols.ecryptfs.source import Devices

    opens = partial(Miscdev, path=given.device)
    return lambda loop, router, log, people: Devices(loop, router, log, opens)


PROTOCOL: Final = Protocol("ecryptfs", (ECRYPTFS, KEY), TABLES, source=source)

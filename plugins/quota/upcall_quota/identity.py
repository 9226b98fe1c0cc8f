"""What a notice is recognised by when it is sent twice."""

from __future__ import annotations

import hashlib

from upcall.protocols.quota.notice import QuotaNotice, pack


def identity(notice: QuotaNotice) -> str:
    """32 hexadecimal digits that are the same whenever this notice is told again."""
    return hashlib.sha256(pack(notice)).hexdigest()[:32]

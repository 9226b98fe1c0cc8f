"""Computes an identifier of a notice, by which receivers detect duplicates."""

from __future__ import annotations

import hashlib

from upcall.protocols.quota.notice import QuotaNotice, pack


def identity(notice: QuotaNotice) -> str:
    """Returns 32 hexadecimal digits, the same for each delivery of this notice."""
    return hashlib.sha256(pack(notice)).hexdigest()[:32]

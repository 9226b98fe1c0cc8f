"""Quotas of ext4 on the real kernel: the right person's daemon is told each thing, once."""

from __future__ import annotations

from tests.kernel.quota_cases import QuotaCases


class TestQuota(QuotaCases):
    kind = "ext4"

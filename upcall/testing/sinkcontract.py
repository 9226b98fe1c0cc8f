"""Checks a sink against the contract, as a pytest class to inherit:

    class TestMySink(SinkContract):
        module = sink

        def settings(self, tmp_path: Path) -> Mapping[str, Any]:
            return {"file": str(tmp_path / "diary")}

Deliveries may fail, but only with the errors of `Sink.tell`. `upcall plugin check` runs the same checks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from upcall.sink import SinkModule
from upcall.testing.checks.sinks import SINK_CHECKS, SinkCheck, SinkSubject
from upcall.testing.subject import NotApplicable

__all__ = ["SINK_CHECKS", "SinkContract"]


class SinkContract:
    """Runs one test, `test_contract`, for each check."""

    module: SinkModule

    def settings(self, tmp_path: Path) -> Mapping[str, Any]:
        """Returns settings that are right: the sink's table in the configuration. Override it if it needs any."""
        return {}

    @pytest.mark.parametrize("check", SINK_CHECKS, ids=lambda check: check.__name__)
    def test_contract(self, check: SinkCheck, tmp_path: Path) -> None:
        try:
            check(SinkSubject(self.module, self.settings(tmp_path)))
        except NotApplicable as why:
            pytest.skip(str(why))

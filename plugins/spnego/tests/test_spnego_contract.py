"""The contract of handlers, where there are no tickets, so that no KDC is asked."""

from __future__ import annotations

from pathlib import Path

import pytest
from upcall_spnego import SpnegoHandler
from upcall_spnego.mitkdc import asking

from upcall.testing.handlercontract import HandlerContract
from upcall.wire.envelope import Envelope


class TestSpnego(HandlerContract):
    handler = SpnegoHandler("/nonexistent/krb5cc")

    @pytest.fixture(autouse=True)
    def nothing_at_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "krb5.conf").touch()
        monkeypatch.setenv("KRB5_CONFIG", str(tmp_path / "krb5.conf"))
        for name in ("KRB5CCNAME", "KRB5_KTNAME", "KRB5_CLIENT_KTNAME"):
            monkeypatch.setenv(name, f"FILE:{tmp_path}/{name}")

    def asking(self) -> Envelope:
        return asking()

"""Posts notices to a URL (HTTP POST), as the JSON of docs/quota.md with "text" and "host" added."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from upcall.core.errors import ModuleFailed, UsageError
from upcall.protocols.quota.notice import QuotaNotice, pack
from upcall.sink import Sink, TryLater
from upcall_quota.identity import identity
from upcall_quota.patience import cut_off
from upcall_quota.secret import read_secret

PATIENCE: Final = 10.0  # seconds for each step
WHOLE: Final = 30.0  # seconds for the whole conversation
_LATER: Final = (408, 425, 429)  # temporary status codes; other 4xx are permanent


class Webhook:
    """A sink that posts notices, with a connection for each. Does not follow redirections."""

    def __init__(self, settings: Mapping[str, Any], patience: float = PATIENCE, whole: float = WHOLE) -> None:
        if "url" not in settings:
            raise UsageError("quota.webhook.url: is needed")
        self._url = urlsplit(settings["url"])
        self._token, self._ca = settings.get("token-file"), settings.get("ca-file")
        self._patience, self._whole = patience, whole
        self._host = socket.gethostname()

    def tell(self, notice: QuotaNotice, text: str, /) -> None:
        body = json.dumps({**json.loads(pack(notice)), "text": text, "host": self._host}).encode("ascii")
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "upcall",
            "Idempotency-Key": identity(notice),  # the same for each attempt
        }
        if self._token:
            headers["Authorization"] = f"Bearer {read_secret(self._token, 'quota.webhook.token-file')}"
        try:
            status = self._post(body, headers)
        except ssl.SSLCertVerificationError as error:
            raise ModuleFailed(f"{self._url.netloc}: {error.verify_message}") from None
        except (OSError, http.client.HTTPException) as error:
            why = (error.strerror or str(error)) if isinstance(error, OSError) else "does not speak HTTP"
            raise TryLater(f"{self._url.netloc}: {why}") from error
        if 200 <= status < 300:
            return
        failed = TryLater if status >= 500 or status in _LATER else ModuleFailed
        raise failed(f"{self._url.netloc}: answers {status}")

    def _post(self, body: bytes, headers: Mapping[str, str]) -> int:
        """Posts the body. Returns the HTTP status; does not read the rest of the response."""
        host, port = self._url.hostname or "", self._url.port
        path = (self._url.path or "/") + (f"?{self._url.query}" if self._url.query else "")
        connection: http.client.HTTPConnection
        if self._url.scheme == "https":
            context = ssl.create_default_context(cafile=self._ca)
            connection = http.client.HTTPSConnection(host, port, timeout=self._patience, context=context)
        else:
            connection = http.client.HTTPConnection(host, port, timeout=self._patience)
        try:
            with cut_off(self._whole, lambda: connection.sock):
                connection.request("POST", path, body, dict(headers))
                return connection.getresponse().status
        finally:
            connection.close()


class WebhookModule:
    name = "webhook"

    def open(self, settings: Mapping[str, Any], /) -> Sink:
        return Webhook(settings)


sink = WebhookModule()

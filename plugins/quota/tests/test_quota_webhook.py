"""A real HTTP server that takes it, fails, stalls, drips and redirects."""

from __future__ import annotations

import json
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from upcall_quota.delivery import Delivery
from upcall_quota.played import Behave, certificate, close, drip, say, serve_once, stall
from upcall_quota.webhook import Webhook, sink

from upcall.core.errors import ModuleFailed, UsageError
from upcall.process.log import EventLog
from upcall.protocols.quota.notice import QuotaNotice, take
from upcall.sink import TryLater
from upcall.testing.notices import hostile, notice
from upcall.testing.processes import PATIENCE, in_time, until


class Server(ThreadingHTTPServer):
    """Answers with the statuses that it is given, and then with 200."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handling)
        self.statuses: list[int] = []
        self.got: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.paths: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/hook?of=quota"


class Handling(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.paths.append(self.path)
        self.server.got.append((dict(self.headers), json.loads(body)))
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        self.send_response(status)
        self.send_header("Location", "http://127.0.0.1:1/elsewhere")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def serve(made: Server) -> threading.Thread:
    thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    return thread


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        thread = serve(made)
        yield made
        made.shutdown()
        thread.join(PATIENCE)


def test_a_notice_is_posted_as_json(server: Server) -> None:
    sink.open({"url": server.url}).tell(notice(), "a sentence")
    ((headers, body),) = server.got
    assert headers["Content-Type"] == "application/json"
    assert server.paths == ["/hook?of=quota"]
    assert (body["text"], body["host"]) == ("a sentence", socket.gethostname())
    assert take(json.dumps(body).encode()) == notice(at=body["at"])


def test_hostile_names_stay_in_the_json(server: Server) -> None:
    told = hostile()
    Webhook({"url": server.url}).tell(told, "a\r\nX-Evil: 1\r\n\r\nsentence")
    ((headers, body),) = server.got
    assert "X-Evil" not in headers
    assert body["subject"]["name"] == told.subject.name


def test_a_failed_post_is_repeated_with_the_same_idempotency_key(server: Server, tmp_path: Path) -> None:
    """500, then 200, by the queue that every sink has."""
    server.statuses = [500, 503]
    log = EventLog("test", os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT))
    delivery = Delivery("webhook", lambda: Webhook({"url": server.url}), log)
    delivery.put(notice(), "a sentence")
    until(lambda: len(server.got) == 3, "three tries")
    until(lambda: "sink-works" in (tmp_path / "log").read_text(), "that it works")
    keys = {headers["Idempotency-Key"] for headers, _ in server.got}
    assert len(keys) == 1
    assert len(keys.pop()) == 32
    delivery.put(notice(used=1), "another")
    until(lambda: len(server.got) == 4, "another")
    assert server.got[3][0]["Idempotency-Key"] != server.got[0][0]["Idempotency-Key"]


@pytest.mark.parametrize(
    ("status", "again"),
    [(500, True), (503, True), (429, True), (408, True), (400, False), (401, False), (404, False), (302, False)],
)
def test_temporary_errors_are_tried_again_and_permanent_ones_are_not(server: Server, status: int, again: bool) -> None:
    server.statuses = [status]
    with pytest.raises(ModuleFailed, match=f"127.0.0.1:[0-9]+: answers {status}") as caught:
        Webhook({"url": server.url}).tell(notice(), "text")
    assert isinstance(caught.value, TryLater) is again
    assert len(server.got) == 1


DRIP = drip(b"HTTP/1.1 200 OK\r\nX-Slow: ", b"x")


@pytest.mark.parametrize(
    "behave", [stall, DRIP, say(b"220 smtp.example.org\r\n"), close], ids=["stall", "drip", "other", "close"]
)
def test_a_server_that_does_not_answer_is_tried_later(behave: Behave) -> None:
    """Some of them would keep it waiting for ever."""
    sink = Webhook({"url": f"http://127.0.0.1:{serve_once(behave)}/"}, patience=0.3, whole=0.6)
    with pytest.raises(TryLater, match=r"127.0.0.1"):
        in_time(lambda: sink.tell(notice(), "text"), "its end")


def test_a_refused_connection_is_tried_later() -> None:
    with socket.create_server(("127.0.0.1", 0)) as once:
        port = once.getsockname()[1]
    with pytest.raises(TryLater, match="Connection refused"):
        Webhook({"url": f"http://127.0.0.1:{port}/"}).tell(notice(), "text")


def test_the_token_is_read_from_a_private_file(server: Server, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text("s3cret\n")
    told: QuotaNotice = notice()
    webhook = Webhook({"url": server.url, "token-file": str(token)})
    webhook.tell(told, "text")
    assert server.got[0][0]["Authorization"] == "Bearer s3cret"
    token.chmod(0o644)
    with pytest.raises(ModuleFailed, match=r"quota.webhook.token-file: .*token: mode 0644 lets others in"):
        webhook.tell(told, "text")
    assert len(server.got) == 1


def test_the_token_is_read_from_a_credential_of_systemd(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    webhook = Webhook({"url": server.url, "token-file": "hook"})
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    with pytest.raises(ModuleFailed, match="'hook' is no whole path, and systemd has given us no credentials"):
        webhook.tell(notice(), "text")
    (tmp_path / "hook").touch(0o400)
    (tmp_path / "hook").chmod(0o600)
    (tmp_path / "hook").write_text("from systemd")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    webhook.tell(notice(), "text")
    assert server.got[0][0]["Authorization"] == "Bearer from systemd"
    (tmp_path / "hook").write_text("two\r\nX-Evil: lines")
    with pytest.raises(ModuleFailed, match="is not one line of printable characters"):
        webhook.tell(notice(), "text")


def test_a_webhook_without_a_url_is_refused() -> None:
    with pytest.raises(UsageError, match=r"quota.webhook.url: is needed"):
        sink.open({})


def test_the_certificate_and_name_of_an_https_server_are_verified(server: Server, tmp_path: Path) -> None:
    pem = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    url = server.url.replace("http:", "https:")
    with pytest.raises(ModuleFailed, match="self-signed certificate") as caught:
        Webhook({"url": url}).tell(notice(), "text")
    assert not isinstance(caught.value, TryLater)
    Webhook({"url": url, "ca-file": str(pem)}).tell(notice(), "text")
    assert len(server.got) == 1
    with pytest.raises(ModuleFailed, match=r"not valid for 'localhost'|mismatch"):
        Webhook({"url": url.replace("127.0.0.1", "localhost"), "ca-file": str(pem)}).tell(notice(), "text")

"""A real SMTP server on this machine: what arrives, and what becomes of refusals, stalls and hostile names."""

from __future__ import annotations

import email
import socket
import ssl
from collections.abc import Callable, Iterator
from email.message import EmailMessage
from email.policy import default
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session
from upcall_quota import mail
from upcall_quota.mail import Mail, sink
from upcall_quota.played import Behave, certificate, close, drip, say, serve_once, stall

from upcall.core.errors import ModuleFailed, UsageError
from upcall.protocols.quota.notice import Cause, Subject
from upcall.sink import TryLater
from upcall.testing.notices import HOSTILE, hostile, notice
from upcall.testing.processes import in_time

PASSWORD = "correct horse"


class Postman:
    """Keeps what it is given; answers what it is told to."""

    def __init__(self) -> None:
        self.got: list[tuple[str | None, list[str], EmailMessage]] = []
        self.answer = "250 OK"
        self.recipient = "250 OK"
        self.wanted: list[tuple[bytes, bytes]] = []

    async def handle_RCPT(
        self, server: SMTP, session: Session, envelope: Envelope, to: str, options: list[str]
    ) -> str:
        if self.recipient.startswith("250"):
            envelope.rcpt_tos.append(to)
        return self.recipient

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        content = envelope.content
        assert isinstance(content, bytes)
        message = email.message_from_bytes(content, policy=default)
        assert isinstance(message, EmailMessage)
        self.got.append((envelope.mail_from, envelope.rcpt_tos, message))
        return self.answer

    def authenticate(
        self, server: SMTP, session: Session, envelope: Envelope, mechanism: str, auth: Any
    ) -> AuthResult:
        assert isinstance(auth, LoginPassword)
        self.wanted.append((auth.login, auth.password))
        return AuthResult(success=auth.password == PASSWORD.encode(), handled=False)


Serve = Callable[..., tuple[Postman, dict[str, Any]]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server; gives what it keeps, and the settings to reach it."""
    running: list[Controller] = []

    def start(**options: Any) -> tuple[Postman, dict[str, Any]]:
        postman = Postman()
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        if options.get("auth_required"):
            options["authenticator"] = postman.authenticate
        running.append(Controller(postman, hostname="127.0.0.1", port=port, **options))
        running[-1].start()
        return postman, {"host": "127.0.0.1", "port": port, "to": "{name}@example.org"}

    yield start
    for controller in running:
        controller.stop()


def test_a_mail_arrives_with_its_headers_and_short_lines(serve: Serve) -> None:
    postman, settings = serve()
    sink.open({**settings, "from": "quota@example.org"}).tell(notice(), "Your files on /home take up 10 GiB. " * 5)
    ((sender, recipients, message),) = postman.got
    assert (sender, recipients) == ("quota@example.org", ["alice@example.org"])
    assert message["Subject"] == f"Quota used up: /home on {socket.gethostname()}"
    assert message["Auto-Submitted"] == "auto-generated"
    assert message["To"] == "alice@example.org"
    assert message["Date"].datetime is not None
    lines = message.get_content().splitlines()
    assert " ".join(lines).startswith("Your files on /home take up 10 GiB. Your files")
    assert max(map(len, lines)) <= 72
    assert lines[-1] == f"upcall on {socket.gethostname()}"


def test_the_same_notice_has_the_same_message_id(serve: Serve) -> None:
    postman, settings = serve()
    told = notice()
    for one in (told, told, told._replace(used=1)):
        Mail(settings).tell(one, "text")
    first, again, other = (message["Message-ID"] for _, _, message in postman.got)
    assert first == again != other


def test_a_mail_goes_to_the_owner_the_cause_or_root_by_the_template(serve: Serve) -> None:
    postman, settings = serve()
    mine = Mail({**settings, "to": "{name}"})
    users = Subject("group", 100, "users")
    mine.tell(notice(subject=users, cause=Cause(5002, "bob")), "text")
    mine.tell(notice(subject=users, cause=Cause()), "text")
    Mail({**settings, "to": "admin+{name}@example.org"}).tell(notice(), "text")
    assert [recipients for _, recipients, _ in postman.got] == [["bob"], ["root"], ["admin+alice@example.org"]]


def test_a_name_smuggles_no_header_and_no_recipient(serve: Serve) -> None:
    postman, settings = serve()
    with pytest.raises(ModuleFailed, match="no mail can be addressed to") as caught:
        Mail(settings).tell(hostile(), "text")
    assert str(caught.value).isprintable()
    for name in ("eve@evil.example, alice", "<eve@evil.example>", 'a"b', "a b", "a\\", "{name}", "%s"):
        Mail(settings).tell(notice(name=name), "text")
    Mail({**settings, "to": "root@example.org"}).tell(hostile(), f"text\n.\nQUIT\n{HOSTILE}".replace("\ud800", ""))
    for _, recipients, message in postman.got:
        (recipient,) = recipients
        assert recipient.endswith("@example.org")
        assert "example.org\nBcc" not in message.as_string()
        assert "Bcc" not in message
    assert len(postman.got) == 8


@pytest.mark.parametrize(("answer", "again"), [("451 later", True), ("554 never", False)])
@pytest.mark.parametrize("at", ["answer", "recipient"])
def test_temporary_refusals_are_tried_again_and_permanent_ones_are_not(
    serve: Serve, at: str, answer: str, again: bool
) -> None:
    postman, settings = serve()
    setattr(postman, at, answer)
    with pytest.raises(ModuleFailed, match=f"the mail server answers {answer[:3]}") as caught:
        Mail(settings).tell(notice(), "text")
    assert isinstance(caught.value, TryLater) is again


@pytest.mark.parametrize("behave", [stall, close])
def test_a_server_that_does_not_answer_is_tried_later(behave: Behave, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mail, "PATIENCE", 0.3)
    monkeypatch.setattr(mail, "WHOLE", 0.6)
    port = serve_once(behave)
    sink = Mail({"host": "localhost", "port": port})
    with pytest.raises(TryLater, match=f"localhost:{port}"):
        in_time(lambda: sink.tell(notice(), "text"), "its end")


def test_a_server_that_drips_bytes_is_given_up_and_tried_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mail, "WHOLE", 0.6)
    port = serve_once(drip(b"", b"220-still greeting\r\n"))
    sink = Mail({"host": "127.0.0.1", "port": port})
    with pytest.raises(TryLater):
        in_time(lambda: sink.tell(notice(), "text"), "its end")


@pytest.mark.parametrize("words", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"554 not for you\r\n"])
def test_a_server_of_another_protocol_or_that_refuses_is_not_tried_again(words: bytes) -> None:
    with pytest.raises(ModuleFailed) as caught:
        Mail({"host": "127.0.0.1", "port": serve_once(say(words))}).tell(notice(), "text")
    assert not isinstance(caught.value, TryLater)


def test_a_password_is_sent_only_after_a_verified_starttls(serve: Serve, tmp_path: Path) -> None:
    pem = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    postman, settings = serve(tls_context=context, require_starttls=True, auth_required=True)
    word = tmp_path / "word"
    word.touch(0o600)
    word.write_text(PASSWORD + "\n")
    settings |= {"security": "starttls", "user": "quota", "password-file": str(word)}
    with pytest.raises(ModuleFailed, match="self-signed certificate") as caught:
        Mail(settings).tell(notice(), "text")
    assert postman.wanted == [], "no password before the server has shown who it is"
    settings["ca-file"] = str(pem)
    Mail(settings).tell(notice(), "text")
    assert postman.wanted == [(b"quota", PASSWORD.encode())]
    assert len(postman.got) == 1
    word.write_text("battery staple")
    with pytest.raises(ModuleFailed, match="the mail server answers 535") as caught:
        Mail(settings).tell(notice(), "text")
    assert "battery" not in repr(caught.value)


def test_a_server_without_tls_gets_nothing(serve: Serve) -> None:
    postman, settings = serve()
    with pytest.raises(ModuleFailed, match="SMTPNotSupportedError"):
        Mail({**settings, "security": "starttls"}).tell(notice(), "text")
    assert postman.got == []


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"user": "quota"}, "quota.mail.user and quota.mail.password-file: one is set without the other"),
        ({"password-file": "/x"}, "one is set without the other"),
        ({"user": "a", "password-file": "/x", "host": "mail.example.org"}, "quota.mail.security: a password goes to"),
    ],
    ids=["no password file", "no user", "no TLS"],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        sink.open(settings)

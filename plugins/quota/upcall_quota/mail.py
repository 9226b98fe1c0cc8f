"""Sends notices by mail (SMTP), by default through this machine's mail server."""

from __future__ import annotations

import smtplib
import socket
import ssl
import textwrap
from collections.abc import Mapping
from email.errors import MessageError
from email.headerregistry import Address
from email.message import EmailMessage
from email.utils import format_datetime, localtime
from typing import Any, Final

from upcall.config.kinds import on_this_machine
from upcall.core.errors import ModuleFailed, UsageError
from upcall.protocols.quota.notice import QuotaNotice, place, printable
from upcall.sink import Sink, TryLater
from upcall_quota.identity import identity
from upcall_quota.patience import cut_off
from upcall_quota.secret import read_secret
from upcall_quota.words import headline, person

PATIENCE: Final = 10.0  # seconds for each reply of the server
WHOLE: Final = 60.0  # seconds for the whole conversation
_PORTS: Final = {"none": 25, "starttls": 587, "tls": 465}


class Mail:
    """A sink that sends mails, with a connection for each."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._host = str(settings.get("host", "localhost"))
        self._security = settings.get("security", "none")
        self._port = settings.get("port", _PORTS[self._security])
        self._user, self._password = settings.get("user"), settings.get("password-file")
        self._ca = settings.get("ca-file")
        self._here = socket.gethostname() or "localhost"
        self._from = settings.get("from", f"upcall@{self._here}")
        self._to = settings.get("to", "{name}")
        if (self._user is None) != (self._password is None):
            raise UsageError("quota.mail.user and quota.mail.password-file: one is set without the other")
        if self._user and self._security == "none" and not on_this_machine(self._host):
            raise UsageError("quota.mail.security: a password goes to another machine by starttls or tls only")

    def tell(self, notice: QuotaNotice, text: str, /) -> None:
        try:
            message = self._message(notice, text)
        except (ValueError, MessageError) as error:  # includes UnicodeError; texts of `email` contain the name
            name = printable(person(notice)[1])[:100]
            raise ModuleFailed(f"no mail can be addressed to {name!r}: {type(error).__name__}") from None
        password = read_secret(self._password, "quota.mail.password-file") if self._password else ""
        try:
            self._send(message, password)
        except smtplib.SMTPRecipientsRefused as error:
            raise self._failed(max(code for code, _ in error.recipients.values())) from None
        except smtplib.SMTPResponseException as error:
            raise self._failed(error.smtp_code) from None
        except smtplib.SMTPServerDisconnected:
            raise TryLater(f"{self._host}:{self._port}: has ended the conversation") from None
        except smtplib.SMTPException as error:  # an OSError, which is why it comes first: it cannot what we need
            raise ModuleFailed(f"{self._host}:{self._port}: {type(error).__name__}") from None
        except ssl.SSLCertVerificationError as error:
            raise ModuleFailed(f"{self._host}:{self._port}: {error.verify_message}") from None
        except OSError as error:
            raise TryLater(f"{self._host}:{self._port}: {error.strerror or error}") from error

    def _failed(self, code: int) -> ModuleFailed:
        """Translates a reply code: 4xx is temporary, 5xx permanent (RFC 5321, 4.2.1)."""
        kind = TryLater if 400 <= code < 500 else ModuleFailed
        return kind(f"{self._host}:{self._port}: the mail server answers {code}")

    def _message(self, notice: QuotaNotice, text: str) -> EmailMessage:
        """Composes the mail. ValueError or MessageError if a name is not valid in an address. Header injection is not
        possible: unprintable characters are escaped, and EmailMessage refuses line feeds."""
        message = EmailMessage()
        message["From"] = _address(self._from, "")
        message["To"] = _address(self._to, person(notice)[1])
        message["Subject"] = f"{headline(notice)}: {place(notice.filesystem)} on {self._here}"
        message["Date"] = format_datetime(localtime())
        message["Message-ID"] = f"<{identity(notice)}@{self._here}>"  # the same for each attempt
        message["Auto-Submitted"] = "auto-generated"  # prevents automatic replies (RFC 3834)
        message.set_content(textwrap.fill(text, 72, break_long_words=False) + f"\n\n-- \nupcall on {self._here}\n")
        return message

    def _send(self, message: EmailMessage, password: str) -> None:
        start = smtplib.SMTP(local_hostname=self._here, timeout=PATIENCE)
        context = None if self._security == "none" else ssl.create_default_context(cafile=self._ca)
        if self._security == "tls" and context is not None:
            start = smtplib.SMTP_SSL(local_hostname=self._here, timeout=PATIENCE, context=context)
        with cut_off(WHOLE, lambda: start.sock):
            _connect(start, self._host, self._port)
            try:
                if self._security == "starttls":
                    start.starttls(context=context)
                if self._user:
                    start.login(self._user, password)
                start.send_message(message)
            finally:
                start.close()


def _connect(server: smtplib.SMTP, host: str, port: int) -> None:
    """Connects as the constructor does, but closes the socket if the server does not send its greeting."""
    server._host = host  # type: ignore[attr-defined]  # the name to check the certificate against
    code, _ = server.connect(host, port)
    if code != 220:
        server.close()
        raise smtplib.SMTPResponseException(code, b"")


def _address(template: str, name: str) -> Address:
    """Returns the address for a user. `template`: an address with {name} in its local part. Address quotes the
    name."""
    local, at, domain = template.rpartition("@")
    if not at:
        local, domain = template, ""
    return Address(username=local.replace("{name}", name), domain=domain)


class MailModule:
    name = "mail"

    def open(self, settings: Mapping[str, Any], /) -> Sink:
        return Mail(settings)


sink = MailModule()

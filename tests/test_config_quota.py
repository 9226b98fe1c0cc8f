"""The table [quota] of the configuration: whatever is wrong in it is named by file and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from upcall import config
from upcall.config import ConfigError
from upcall.protocols.quota.settings import Rules
from upcall.protocols.quota.setup import rules

WHOLE = """
[quota]
sinks = ["desktop", "mail"]
system-sinks = []
[quota.terminal]
which = "last"
[quota.mail]
host = "mail.example.org"
port = 587
security = "starttls"
ca-file = "/etc/ssl/own.pem"
user = "quota"
password-file = "smtp"
from = "quota@example.org"
to = "{name}@example.org"
[quota.webhook]
url = "https://example.org/hook?of=quota"
token-file = "/etc/upcall/token"
[quota.sink.lamp]
colour = "red"
"""


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(config, "SYSTEM", tmp_path / "system.toml")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    return tmp_path / "system.toml"


def test_a_complete_quota_table_is_read(system: Path) -> None:
    system.write_text(WHOLE)
    system.chmod(0o644)
    told = config.settings("quota", user=True)
    assert told["sinks"] == ("desktop", "mail")
    assert told["system-sinks"] == ()
    assert told["mail"]["port"] == 587
    assert told["sink"] == {"lamp": {"colour": "red"}}


def test_the_brokers_rules_ignore_the_daemons_keys(system: Path) -> None:
    system.write_text(WHOLE.replace("[quota]", "[quota]\nsettle = 3"))
    system.chmod(0o644)
    assert rules() == Rules(settle=3)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("sinks = 'desktop'", "quota.sinks: must be a list of names"),
        ("sinks = ['']", "quota.sinks: must be a list of names"),
        ("sinks = ['log', 'log']", "quota.sinks: names an entry twice"),
        ("sinkz = ['log']", "quota.sinkz: unknown"),
        ("terminal.which = 'some'", "quota.terminal.which: 'some'; must be one of all, last"),
        ("mail = 'me'", "quota.mail: must be a table"),
        ("mail.port = 0", "quota.mail.port: must be a whole number from 1 to 65535"),
        ("mail.port = true", "quota.mail.port: must be a whole number"),
        ("mail.port = '25'", "quota.mail.port: must be a whole number"),
        ("mail.security = 'ssl'", "quota.mail.security: 'ssl'; must be one of none, starttls, tls"),
        ("mail.ca-file = 'x'", "quota.mail.ca-file: must be an absolute path"),
        ("mail.password-file = '../x'", "quota.mail.password-file: must be an absolute path"),
        ("mail.password-file = '..'", "quota.mail.password-file: must be the absolute path of a private file, or"),
        ("mail.password = 'x'", "quota.mail.password: unknown"),
        ('mail.to = "a\\r\\nBcc: b"', "quota.mail.to: must be a text of printable characters"),
        ("mail.from = ' x'", "quota.mail.from: must be a text"),
        ("mail.host = ''", "quota.mail.host: must be a text"),
        ("webhook.url = 'example.org'", "quota.webhook.url: must be a URL that begins with https://"),
        ("webhook.url = 'ftp://example.org'", "quota.webhook.url: must be a URL that begins"),
        ("webhook.url = 'https://'", "quota.webhook.url: must be a URL that begins"),
        ("webhook.url = 'https://a b'", "quota.webhook.url: must be a URL, in ASCII"),
        ("webhook.url = 'https://[::1'", "quota.webhook.url: is no URL: Invalid IPv6 URL"),
        ("webhook.url = 'https://example.org:99999'", "quota.webhook.url: is no URL: Port out of range"),
        ("webhook.url = 'http://example.org/'", "quota.webhook.url: http is for this machine only"),
        ("webhook.url = 'http://127.0.0.1.example.org/'", "quota.webhook.url: http is for this machine only"),
        ("webhook.url = 'https://me:word@example.org/'", "quota.webhook.url: must not contain a name or a password"),
        ("sink = ['lamp']", "quota.sink: must be a table"),
        ("sink.lamp = 1", "quota.sink.lamp: must be a table"),
    ],
)
def test_an_invalid_value_is_refused_naming_file_line_and_key(system: Path, text: str, why: str) -> None:
    system.write_text(f"[quota]\n{text}\n")
    system.chmod(0o644)
    with pytest.raises(ConfigError) as caught:
        config.settings("quota")
    assert str(caught.value).startswith(f"{system}:2: {why}")


@pytest.mark.parametrize("url", ["http://127.0.0.1:8080/x", "http://[::1]/", "http://localhost/", "https://10.0.0.1/"])
def test_local_http_and_any_https_urls_are_accepted(system: Path, url: str) -> None:
    system.write_text(f"[quota.webhook]\nurl = '{url}'\n")
    system.chmod(0o644)
    assert config.settings("quota") == {"webhook": {"url": url}}

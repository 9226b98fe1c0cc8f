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
        ("sinks = 'desktop'", "quota.sinks: a list of names is wanted"),
        ("sinks = ['']", "quota.sinks: a list of names is wanted"),
        ("sinks = ['log', 'log']", "quota.sinks: a name stands there twice"),
        ("sinkz = ['log']", "quota.sinkz: unknown"),
        ("terminal.which = 'some'", "quota.terminal.which: 'some'; one of all, last is wanted"),
        ("mail = 'me'", "quota.mail: a table is wanted"),
        ("mail.port = 0", "quota.mail.port: a whole number from 1 to 65535 is wanted"),
        ("mail.port = true", "quota.mail.port: a whole number"),
        ("mail.port = '25'", "quota.mail.port: a whole number"),
        ("mail.security = 'ssl'", "quota.mail.security: 'ssl'; one of none, starttls, tls is wanted"),
        ("mail.ca-file = 'x'", "quota.mail.ca-file: a whole path is wanted"),
        ("mail.password-file = '../x'", "quota.mail.password-file: a whole path is wanted"),
        ("mail.password-file = '..'", "quota.mail.password-file: the whole path of a private file, or"),
        ("mail.password = 'x'", "quota.mail.password: unknown"),
        ('mail.to = "a\\r\\nBcc: b"', "quota.mail.to: a text of printable characters is wanted"),
        ("mail.from = ' x'", "quota.mail.from: a text"),
        ("mail.host = ''", "quota.mail.host: a text"),
        ("webhook.url = 'example.org'", "quota.webhook.url: a URL is wanted that begins with https://"),
        ("webhook.url = 'ftp://example.org'", "quota.webhook.url: a URL is wanted that begins"),
        ("webhook.url = 'https://'", "quota.webhook.url: a URL is wanted that begins"),
        ("webhook.url = 'https://a b'", "quota.webhook.url: a URL is wanted, in ASCII"),
        ("webhook.url = 'https://[::1'", "quota.webhook.url: is no URL: Invalid IPv6 URL"),
        ("webhook.url = 'https://example.org:99999'", "quota.webhook.url: is no URL: Port out of range"),
        ("webhook.url = 'http://example.org/'", "quota.webhook.url: http is for this machine only"),
        ("webhook.url = 'http://127.0.0.1.example.org/'", "quota.webhook.url: http is for this machine only"),
        ("webhook.url = 'https://me:word@example.org/'", "quota.webhook.url: no name and no password"),
        ("sink = ['lamp']", "quota.sink: a table is wanted"),
        ("sink.lamp = 1", "quota.sink.lamp: a table is wanted"),
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

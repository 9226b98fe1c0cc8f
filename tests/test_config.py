"""The configuration: what the system's file allows, the user's can only narrow; errors name file, line and reason."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from upcall import config
from upcall.cli import main
from upcall.config import Config, ConfigError
from upcall.core.errors import ModuleFailed, UsageError
from upcall.daemon.loading import loaders
from upcall.daemon.plugin_discovery import found
from upcall.daemon.plugins import Module, Overrides
from upcall.keys import plugins as modules
from upcall.process.log import EventLog

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes the system's file, or the user's, and gives its path."""
    monkeypatch.setattr(config, "SYSTEM", tmp_path / "system.toml")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    config.user_file().parent.mkdir(parents=True)

    def put(text: str | bytes, user: bool = False, mode: int = 0o644) -> Path:
        file = config.user_file() if user else tmp_path / "system.toml"
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        file.chmod(mode)
        return file

    return put


def test_without_files_everything_is_allowed(write: Write) -> None:
    assert config.load() == Config()
    assert config.load().allows("anything")


def test_the_user_narrows_the_systems_list_and_cannot_widen_it(write: Write) -> None:
    write('[plugins]\nallow = ["openssl", "x25519"]\n')
    assert config.load().allow == frozenset({"openssl", "x25519"})
    user = write('[plugins]\nallow = ["x25519", "mine"]\n', user=True)
    found = config.load()
    assert found.allow == frozenset({"x25519"})
    assert not found.allows("mine")
    assert str(user) in found.refusal("mine")


def test_a_user_without_a_list_gets_the_systems_list(write: Write) -> None:
    write("[plugins]\nallow = []\n")
    write("", user=True)
    assert config.load().allow == frozenset()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('plugin.allow = ["x"]', r"1: plugin: unknown; did you mean plugins\?"),
        ("x = 1", "1: x: unknown; plugins, .* can be set here"),
        ('[plugins]\nalow = ["x"]', r"2: plugins\.alow: unknown; did you mean plugins\.allow\?"),
        ("\nplugins = 1", "2: plugins: must be a table"),
        ('[plugins]\nallow = "openssl"', r"2: plugins\.allow: must be a list of names"),
        ("[plugins]\n# they\n\nallow = [1]", r"4: plugins\.allow: must be a list of names"),
        ("[plugins]\nallow = nothing", "2: Invalid value in column 9"),
        ("[plugins]\nallow = [\n", "2: .* at the end"),
        ("[plugins]\nallow = []\nallow = []", "3: Cannot overwrite a value"),
        (b"\xff", "1: is not UTF-8 at byte 0"),
        (b"#\n#\xff", "2: is not UTF-8 at byte 3"),
        ("x = " + "[" * 9999, " is nested too deeply"),
    ],
    ids=[
        "misspelt table",
        "unknown key",
        "misspelt key",
        "table is a number",
        "list is a string",
        "name is a number",
        "invalid value",
        "unfinished list",
        "key twice",
        "not UTF-8",
        "not UTF-8 in line 2",
        "nested too deeply",
    ],
)
@pytest.mark.parametrize("user", [False, True])
def test_an_invalid_file_is_refused_naming_file_line_and_reason(
    write: Write, text: str | bytes, why: str, user: bool
) -> None:
    file = write(text, user)
    with pytest.raises(ConfigError, match=why) as caught:
        config.load()
    assert str(caught.value).startswith(f"{file}:")
    assert caught.value.file == file


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_a_file_that_others_could_write_is_refused(write: Write, mode: int) -> None:
    write("", user=True, mode=mode)
    with pytest.raises(ConfigError, match=f"mode {mode:04o} lets others write"):
        config.load()


def test_a_file_of_another_user_is_refused(write: Write) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(write(""), 65534, 65534)
    with pytest.raises(ConfigError, match="belongs to uid 65534"):
        config.load()


def test_a_file_that_is_not_regular_is_refused(write: Write) -> None:
    file = write("")
    file.unlink()
    os.mkfifo(file, 0o644)
    with pytest.raises(ConfigError, match="not a regular file"):
        config.load()


def test_commands_refuse_a_module_that_is_not_allowed(write: Write) -> None:
    file = write('[plugins]\nallow = ["x25519"]\n')
    assert modules.find("x25519").spec == "upcall_x25519:module"
    with pytest.raises(UsageError, match=f"'openssl' is installed, but not allowed: .* in {file}"):
        modules.find("openssl")
    with pytest.raises(UsageError, match="there is no key module 'nothing'"):
        modules.find("nothing")
    done = CliRunner().invoke(main, ["key", "generate", "new", "--module", "openssl"])
    assert done.exit_code == os.EX_USAGE
    assert "not allowed" in done.output


def test_a_users_table_is_merged_over_the_systems(write: Write) -> None:
    assert config.settings("request-key") == {}
    write('[daemon]\nstart = ["a", "{uid}"]\n[request-key."cifs.spnego"]\nwithout-daemon = "start"\n')
    assert config.settings("daemon") == {"start": ("a", "{uid}")}
    assert config.settings("request-key") == {"cifs.spnego": {"without-daemon": "start"}}
    write('[quota]\nsettle = 5\nsinks = ["log"]\n[quota.sink.lamp]\ncolour = "red"\nroom = 1\n[quota.webhook]\n')
    write('[quota.sink]\nlamp.colour = "blue"\nbell.tone = "low"\n[quota.mail]\n', user=True)
    system = {"settle": 5, "sinks": ("log",), "sink": {"lamp": {"colour": "red", "room": 1}}, "webhook": {}}
    assert config.settings("quota") == system
    sinks = {"lamp": {"colour": "blue", "room": 1}, "bell": {"tone": "low"}}
    assert config.settings("quota", user=True) == {**system, "sink": sinks, "mail": {}}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            '[request-key."cifs.spnego"]\nwithout-daemon = "hope"',
            r"2: request-key\.\"cifs\.spnego\"\.without-daemon: 'hope'; must be one of refuse",
        ),
        ("[request-key.afs]", "request-key.afs: unknown"),
        ("[daemon]\nstart = []", "daemon.start: must be a program and its arguments"),
        ("[request-key.dns_resolver]\nuser = 0", "dns_resolver.user: must be the name of a user"),
    ],
)
def test_an_invalid_value_in_a_table_is_refused_by_name(write: Write, text: str, why: str) -> None:
    write(text)
    with pytest.raises(ConfigError, match=why):
        config.settings("plugins")


def test_the_daemon_refuses_a_denied_module_with_the_reason(write: Write) -> None:
    write('[plugins]\nallow = ["x25519"]\n')
    with pytest.raises(UsageError, match="not allowed"):
        found(Overrides(isolate=("openssl",)))
    modules = found(Overrides()).modules
    assert Module("x25519", "upcall_x25519:module") in modules
    assert all(module.denied for module in modules if "upcall_rsa" in module.spec)
    load = loaders(modules, lambda: 0.0, EventLog("test"))
    assert load["x25519"]().name == "x25519"
    with pytest.raises(ModuleFailed, match="'openssl' is installed, but not allowed"):
        load["openssl"]()


def test_a_broken_configuration_has_its_own_exit_code(write: Write) -> None:
    write("[plugins]\n?", user=True)
    done = CliRunner().invoke(main, ["plugin", "list"])
    assert done.exit_code == os.EX_CONFIG
    assert f"{config.user_file()}:2: " in done.output


def test_plugin_list_says_what_is_allowed(write: Write) -> None:
    write('[plugins]\nallow = ["x25519"]\n')
    done = CliRunner().invoke(main, ["plugin", "list", "--json"])
    allowed = {one["name"]: one["allowed"] for one in json.loads(done.output)}
    assert allowed["x25519"] is True
    assert allowed["openssl"] is False

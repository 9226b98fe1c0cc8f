"""What a process is told at its start: one argument, checked by field and type."""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest

from upcall.broker.settings import BrokerSettings
from upcall.cli import daemon
from upcall.core.errors import UpcallError, UsageError
from upcall.daemon.plugins import Discovered, Module, Overrides, Plugins, ServiceHandler
from upcall.daemon.prompting.settings import PromptSettings
from upcall.daemon.settings import DaemonSettings
from upcall.keys.store import Entry, KeyStore
from upcall.process import entry, trust
from upcall.process.hardening import DaemonHardening
from upcall.process.settings import MAX, dumps, handed_over, loads, of_arguments
from upcall.protocols.ecryptfs import auto_add
from upcall.protocols.ecryptfs.settings import AddedKey, FailedKey, LockSettings, LoginKeys
from upcall.protocols.quota.settings import SourceSettings

FULL = DaemonSettings(
    folder=Path("/run/up call/\udcff"),  # not UTF-8 on disk
    prove_all=True,
    records="/var/log/requests",
    plugins=Plugins(
        (
            Module("toy", "upcall.testing.toy:TOY"),
            Module("rsa", "upcall_rsa:module", isolated=True),
            Module("x", "x:y", denied="it is 'not' wanted = \"no\"\n"),
        ),
        (ServiceHandler("cifs.spnego", "upcall_spnego:handler"),),
        Overrides(("rsa",), ("toy",)),
    ),
    locking=LockSettings(1.5, ("suspend",)),
    prompting=PromptSettings(("pinentry",), "/usr/bin/pinentry", 0.0, 30.0),
    hardening=DaemonHardening(False, False, (Path("/srv/ü"),)),
    keys=LoginKeys(Path("/keys"), (AddedKey("a", "0" * 16),), (FailedKey("", "Permission denied"),)),
)


class Everything(NamedTuple):
    """A field of each type."""

    name: str
    yes: bool = False
    number: int = 0
    seconds: float = 0.0
    maybe: int | None = None
    inner: tuple[LockSettings, ...] = ()


@pytest.mark.parametrize(
    "settings",
    [FULL, DaemonSettings(), BrokerSettings(), BrokerSettings(Path("/x"), Path("/dev/ecryptfs"), 8, "no"),
     SourceSettings(Path("/x")), Discovered(FULL.plugins, FULL.locking), Everything("x", maybe=0, number=1)],
    ids=lambda settings: type(settings).__name__,
)  # fmt: skip
def test_settings_come_back_equal_from_their_text(settings: Any) -> None:
    text = dumps(settings)
    assert loads(type(settings), text) == settings
    assert text.isascii() and "\0" not in text


def test_fields_with_their_default_are_left_out() -> None:
    assert dumps(DaemonSettings()) == "{}"
    assert dumps(DaemonSettings(folder=Path("/x"))) == '{"folder":"/x"}'
    assert dumps(DaemonSettings(locking=LockSettings(after=5.0))) == '{"locking":{"after":5.0}}'
    assert dumps(DaemonSettings(prompting=PromptSettings(ways=()))) == '{"prompting":{"ways":[]}}'


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not JSON"),
        ("folder=/x", "not JSON"),
        ('{"name": "x"', "not JSON"),
        ('{"name": "x"} {}', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"name": "x", "number": ' + "9" * 5000 + "}", "not JSON"),
        (" " * (MAX + 1), f"{MAX + 1} characters, at most {MAX} are allowed"),
        ("[]", "all of it: an object is needed, not []"),
        ("null", "all of it: an object is needed, not None"),
        ("{}", "name: is missing"),
        ('{"name": "x", "nam": 1}', "nam: no such field"),
        ('{"name": "x", "_asdict": 1}', "_asdict: no such field"),
        ('{"name": "x", "' + "n" * 1000 + '": 1}', "n: no such field"),
        ('{"name": "x", "name": "y"}', "'name' is given twice"),
        ('{"name": 1}', "name: a string without NUL is needed, not 1"),
        ('{"name": null}', "name: a string without NUL is needed, not None"),
        ('{"name": "a\\u0000b"}', "name: a string without NUL is needed, not 'a\\x00b'"),
        ('{"name": "x", "yes": 1}', "yes: true or false is needed, not 1"),
        ('{"name": "x", "yes": "true"}', "yes: true or false is needed, not 'true'"),
        ('{"name": "x", "number": true}', "number: a whole number is needed, not True"),
        ('{"name": "x", "number": 1.0}', "number: a whole number is needed, not 1.0"),
        ('{"name": "x", "seconds": NaN}', "seconds: a finite number is needed, not nan"),
        ('{"name": "x", "seconds": -Infinity}', "seconds: a finite number is needed, not -inf"),
        ('{"name": "x", "seconds": 1e999}', "seconds: a finite number is needed, not inf"),
        ('{"name": "x", "seconds": 1' + "0" * 400 + "}", "seconds: a finite number is needed, not 1000"),
        ('{"name": "x", "seconds": false}', "seconds: a finite number is needed, not False"),
        ('{"name": "x", "maybe": "1"}', "maybe: a whole number is needed, not '1'"),
        ('{"name": "x", "inner": {}}', "inner: a list is needed, not {}"),
        ('{"name": "x", "inner": "ab"}', "inner: a list is needed, not 'ab'"),
        ('{"name": "x", "inner": [{}, []]}', "inner[1]: an object is needed, not []"),
        ('{"name": "x", "inner": [{"causes": ["a", 1]}]}', "inner[0].causes[1]: a string without NUL is needed"),
        ('{"name": "x", "inner": [{"cause": []}]}', "inner[0].cause: no such field"),
        ('{"name": "x", "inner": [{"after": 1, "after": 2}]}', "'after' is given twice"),
    ],
)  # fmt: skip
def test_text_that_is_wrong_is_refused_with_the_field(text: str, why: str) -> None:
    with pytest.raises(UsageError) as error:
        loads(Everything, text)
    assert str(error.value).startswith("settings: ") and why in str(error.value)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize(
    ("text", "field"),
    [('{"folder": "/x\\u0000"}', "folder"), ('{"folder": 1}', "folder"), ('{"hardening": {"writable": [1]}}',
      "hardening.writable[0]"), ('{"prompting": {"pin_time": NaN}}', "prompting.pin_time"),
     ('{"plugins": {"modules": [{"alias": "x"}]}}', "plugins.modules[0].spec"), ('{"locking": null}', "locking")],
)  # fmt: skip
def test_the_daemons_settings_name_the_field_with_those_around_it(text: str, field: str) -> None:
    with pytest.raises(UsageError, match="settings: ") as error:
        loads(DaemonSettings, text)
    assert str(error.value).startswith(f"settings: {field}: ")


def test_whole_numbers_are_taken_for_seconds() -> None:
    taken = loads(Everything, '{"name": "x", "seconds": 3}')
    assert taken.seconds == 3.0 and type(taken.seconds) is float


@pytest.mark.parametrize(
    "settings",
    [DaemonSettings(prompting=PromptSettings(pin_time=math.nan)), DaemonSettings(locking=LockSettings(math.inf)),
     DaemonSettings(records="a\0b"), DaemonSettings(records="x" * MAX), BrokerSettings(contexts="8")],  # type: ignore[arg-type]
)  # fmt: skip
def test_what_would_be_refused_is_not_passed_on(settings: Any) -> None:
    with pytest.raises(UsageError, match="settings: "):
        dumps(settings)


def test_a_process_takes_one_argument_or_none() -> None:
    assert of_arguments(DaemonSettings, []) == DaemonSettings()
    assert of_arguments(DaemonSettings, ['{"folder": "/x"}']) == DaemonSettings(Path("/x"))
    with pytest.raises(UsageError, match="2 arguments, at most one"):
        of_arguments(DaemonSettings, ["{}", "{}"])


def test_settings_in_a_memfd_come_back_equal_and_its_descriptor_is_closed() -> None:
    argument = handed_over(FULL)
    fd = int(argument.removeprefix("@"))
    assert os.get_inheritable(fd)
    with pytest.raises(PermissionError):
        os.write(fd, b"x")
    assert of_arguments(DaemonSettings, [argument]) == FULL
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize("argument", ["@", "@x", "@-1", "@ 1", "@1\n", "@\u0663", "@1.0", "@" + "9" * 5000])
def test_an_argument_that_names_no_descriptor_is_refused(argument: str) -> None:
    with pytest.raises(UsageError, match="@ and the number of a descriptor is needed") as error:
        of_arguments(DaemonSettings, [argument])
    assert len(str(error.value)) < 250


def test_a_descriptor_that_is_not_open_or_no_memfd_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Bad file descriptor"):
        of_arguments(DaemonSettings, ["@999999999"])
    reading, writing = os.pipe()  # nothing is written: reading it would block
    try:
        with pytest.raises(UsageError, match="not a sealed memfd: Invalid argument"):
            of_arguments(DaemonSettings, [f"@{reading}"])
    finally:
        os.close(reading)
        os.close(writing)
    (tmp_path / "x").write_text("{}")
    with (tmp_path / "x").open() as file, pytest.raises(UsageError, match="not a sealed memfd"):
        of_arguments(DaemonSettings, [f"@{file.fileno()}"])


@pytest.mark.parametrize(
    ("data", "seal", "why"),
    [(b"{}", False, "the memfd is not sealed"), (b" " * (MAX + 1), True, f"more than {MAX} bytes"),
     (b"\xff", True, "not ASCII"), (b"", True, "not JSON"), (b'{"folder": 1}', True, "folder: a path is needed")],
)  # fmt: skip
def test_a_memfd_with_wrong_content_is_refused(data: bytes, seal: bool, why: str) -> None:
    fd = os.memfd_create("settings", os.MFD_ALLOW_SEALING)
    os.write(fd, data)
    if seal:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0xF)
    try:
        with pytest.raises(UsageError, match=why):
            of_arguments(DaemonSettings, [f"@{fd}"])
    finally:
        if not seal:
            os.close(fd)


def test_without_a_memfd_the_error_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(UpcallError, match="handed over in memory: Function not implemented"):
        handed_over(DaemonSettings())


def test_results_of_any_number_of_keys_fit_into_the_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    store = KeyStore()
    store.directory.mkdir(parents=True)
    for number in range(300):
        (store.directory / f"{number:064}.toml").touch()

    def load(_: KeyStore, name: str) -> Entry:
        if int(name) % 2:
            raise UsageError("\udcff\0" * 1000)
        return Entry(name, "toy", "0" * 16, "none", "", datetime.datetime.now(datetime.UTC), auto=True)

    monkeypatch.setattr(KeyStore, "load", load)
    monkeypatch.setattr(auto_add, "add_token", lambda _: True)
    keys = auto_add.add_auto_keys()
    assert (len(keys.added), len(keys.failed)) == (100, 30)
    assert keys.failed[0] == FailedKey(f"{1:064}.toml", "\udcff?" * 150)
    assert len(dumps(keys)) < MAX / 2


# --- processes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["upcall.daemon", "upcall.broker", "upcall.protocols.quota"])
@pytest.mark.parametrize(
    ("text", "why"), [('{"folder": 1}', "folder: a path is needed, not 1"), ("folder=/x", "not JSON"),
     ("@999", "'@999': not a sealed memfd: Bad file descriptor"), ("@x", "'@x': @ and the number")],
)  # fmt: skip
def test_a_process_with_wrong_settings_ends_with_the_field_and_a_status(module: str, text: str, why: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, text], capture_output=True, text=True, timeout=60)
    assert done.returncode == os.EX_USAGE
    assert f": settings: {why}" in done.stderr and "Traceback" not in done.stderr


def test_plugin_discovery_with_wrong_overrides_says_which() -> None:
    words = [sys.executable, "-m", "upcall.daemon.plugin_discovery", json.dumps({"isolate": "toy"})]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (os.EX_CONFIG, "")
    assert done.stderr == "settings: isolate: a list is needed, not 'toy'\n"


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DaemonSettings]:
    """`upcall daemon` with these options, up to its exec: what it would hand on."""
    handed: list[list[str]] = []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(os, "execve", lambda _, words, __: handed.append(words))

    def settings(*options: str) -> DaemonSettings:
        daemon.command.main(options, standalone_mode=False)
        (words,) = handed
        assert words[-3:-1] == ["-m", "upcall.daemon"]
        assert words[-1].startswith("@")
        return of_arguments(DaemonSettings, words[-1:])

    return settings


def test_the_commands_options_are_handed_on(command: Callable[..., DaemonSettings], tmp_path: Path) -> None:
    settings = command(
        "--runtime", str(tmp_path), "--prove-all", "--isolate", "openssl", "--inline", "x25519", "--pin-time", "0",
        "--prompt-time", "30", "--pinentry", "/bin/sh", "--ask", "systemd,agent", "--log-requests", "/var/log/x",
    )  # fmt: skip
    assert settings[:3] == (tmp_path, True, "/var/log/x")
    assert settings.plugins.overrides == Overrides(("openssl",), ("x25519",))
    assert {module.alias: module.isolated for module in settings.plugins.modules}["openssl"]
    assert settings.prompting == PromptSettings(("systemd", "agent"), "/bin/sh", 0.0, 30.0)
    assert settings.keys == LoginKeys()


def test_a_pin_may_be_kept_forever_but_not_for_what_is_no_number(command: Callable[..., DaemonSettings]) -> None:
    with pytest.raises(click.BadParameter, match=r"'nan' is not a number of seconds from 0 to 1000000000, or inf"):
        command("--pin-time", "nan")
    assert command("--pin-time", "inf").prompting.pin_time > 30 * 365 * 86400


@pytest.mark.parametrize(
    ("raised", "status"),
    [(None, 0), (UpcallError("why"), os.EX_UNAVAILABLE), (OSError(13, "why"), os.EX_UNAVAILABLE),
     (UsageError("why"), os.EX_UNAVAILABLE)],
)  # fmt: skip
def test_the_exit_status_of_a_process(
    raised: Exception | None, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    faults = [trust.Fault("/x", "is open", "")]
    monkeypatch.setattr(trust, "require", lambda: faults)
    given: list[object] = []

    def serve(settings: SourceSettings, found: object) -> None:
        given.append((settings, found))
        if raised is not None:
            raise raised

    assert entry.run("it", SourceSettings, ['{"folder": "/x"}'], serve) == status
    assert given == [(SourceSettings(Path("/x")), faults)]
    said = capsys.readouterr().err
    assert said == ("" if raised is None else "it: why\n")

"""A daemon finds out again what it may load, while it is at work: nothing that is under way is lost."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from upcall import config
from upcall.cli import main
from upcall.core.errors import ModuleFailed, Refused
from upcall.core.messages import Answer, Refusal
from upcall.daemon import plugin_discovery as finding
from upcall.daemon import reload as renewing
from upcall.daemon.loading import loaders
from upcall.daemon.plugins import Discovered, Module, Overrides, Plugins, ServiceHandler
from upcall.daemon.settings import DaemonSettings
from upcall.keymodule import KeyModule
from upcall.process.control import DaemonControl
from upcall.process.log import EventLog
from upcall.process.settings import dumps
from upcall.protocols.ecryptfs.key_handler import KeyHandler
from upcall.protocols.ecryptfs.packets import Ask, FileKey, pack_ask, pack_file_key
from upcall.testing.gate import Gate
from upcall.testing.keys import FolderKeyring
from upcall.testing.played import PlayedBroker, PlayedRequester
from upcall.testing.processes import PATIENCE, RunningBroker, RunningDaemon, Started, until
from upcall.testing.toy import TOY

HERE = Path(__file__).parent
KEY = b"0123456789abcdef"
TOY_MODULE, BAD_MODULE = Module("toy", "upcall.testing.toy:TOY"), Module("bad", "misbehaving:BAD")
SLOW = "feedfeedfeedfeed"


def wrap_of(signature: str) -> bytes:
    return pack_ask(Ask(0x42, signature, pack_file_key(FileKey(0, KEY))))


class Scene:
    """A broker, and a daemon that finds what a file says."""

    def __init__(self, broker: RunningBroker, daemon: RunningDaemon, found: Path) -> None:
        self.broker, self.daemon, self._found = broker, daemon, found

    def reload(self, *modules: Module) -> None:
        before = self.daemon.log.count(" configuration-reloaded ")
        self.find(modules)
        self.daemon.signal(signal.SIGHUP)
        until(lambda: self.daemon.log.count(" configuration-reloaded ") > before, "the daemon has found it")

    def find(self, modules: Sequence[Module]) -> None:
        self.write(dumps(Discovered(Plugins(tuple(modules)))))

    def write(self, text: str) -> None:
        new = self._found.with_suffix(".new")
        new.write_text(text)
        new.replace(self._found)

    def wrap(self, signature: str) -> str:
        with self.broker.client() as client:
            try:
                assert client.unwrap(signature, client.wrap(signature, KEY)) == KEY
            except Refused as refused:
                return refused.reason
        return "answered"


@pytest.fixture
def scene(folder: Path, broker: RunningBroker, signature: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder.parent / "run"))
    found = folder.parent / "found.json"
    modules = {"toy": "upcall.testing.toy:TOY", "bad": "misbehaving:BAD"}
    settings = DaemonSettings(plugins=Plugins(handlers=(ServiceHandler("test.echo", "answering:telling"),)))
    keys, path = folder.parent / "keys", [HERE, HERE.parent]
    with RunningDaemon(folder, keys, modules, path, control=True, settings=settings, found=found) as daemon:
        broker.registered(daemon.pid)
        yield Scene(broker, daemon, found)


def test_a_denied_module_is_refused_until_a_reload_allows_it_again(
    scene: Scene, signature: str, keyring: FolderKeyring
) -> None:
    keyring.add(SLOW, "bad", b"later")
    assert scene.wrap(signature) == scene.wrap(SLOW) == "answered"
    scene.reload(TOY_MODULE._replace(denied="it is not wanted"), BAD_MODULE)
    assert scene.wrap(signature) == "module-failed"
    scene.daemon.logged("it is not wanted")
    with DaemonControl() as control:  # the other's key was left as it is
        assert control.status()["keys"] == [{"signature": SLOW, "module": "bad", "open": True}]
    scene.reload(BAD_MODULE)
    assert scene.wrap(signature) == "no-module"
    scene.reload(TOY_MODULE, BAD_MODULE)
    assert scene.wrap(signature) == "answered"
    assert "more=module=toy less=nothing" in scene.daemon.log


def test_a_reload_moves_a_module_into_a_process_of_its_own(scene: Scene, signature: str) -> None:
    assert scene.wrap(signature) == "answered"
    scene.reload(TOY_MODULE._replace(isolated=True))
    assert scene.wrap(signature) == "answered"
    with DaemonControl() as control:
        assert any(one.get("isolated") for one in control.status()["keys"])


def test_requests_in_progress_are_answered_across_reloads(
    scene: Scene, signature: str, keyring: FolderKeyring, gate: Gate
) -> None:
    keyring.add(SLOW, "bad", f"gate {gate.path}".encode())
    with PlayedRequester(scene.broker.folder) as held, PlayedRequester(scene.broker.folder) as requester:
        held.ask(wrap_of(SLOW))
        visitor = gate.arrived()
        for number in range(200):
            if number % 20 == 0:  # the one that has it in hand is denied, and allowed again
                scene.find([TOY_MODULE, BAD_MODULE][: 1 + number // 20 % 2])
                scene.daemon.signal(signal.SIGHUP)
            requester.ask(wrap_of(signature))
            assert requester.reason() == "answered"
        scene.reload(TOY_MODULE)
        visitor.release()
        assert held.reason() == "answered"
        requester.ask(wrap_of(SLOW))
        assert requester.reason() == "no-module"
    outcomes = scene.broker.outcomes()
    assert outcomes == {"answered": 201, "no-module": 1}
    scene.daemon.signal(signal.SIGTERM)
    assert scene.daemon.wait() == 0


def test_a_reload_with_malformed_findings_changes_nothing(scene: Scene, signature: str) -> None:
    scene.write("?")
    scene.daemon.signal(signal.SIGHUP)
    scene.daemon.logged("found.json: settings: not JSON: ")
    assert scene.wrap(signature) == "answered"
    scene.reload(TOY_MODULE)
    assert scene.wrap(signature) == "answered"


def test_config_reload_reloads_the_daemon_and_refuses_a_bad_file(
    scene: Scene, signature: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(config, "SYSTEM", tmp_path / "system.toml")
    scene.find([BAD_MODULE])
    done = CliRunner().invoke(main, ["config", "reload"])
    assert (done.exit_code, done.output) == (0, "")
    scene.daemon.logged("configuration-reloaded")
    assert scene.wrap(signature) == "no-module"
    (tmp_path / "system.toml").write_text("\n?\n")
    done = CliRunner().invoke(main, ["config", "reload"])
    assert done.exit_code == os.EX_CONFIG
    assert f"{tmp_path}/system.toml:2: " in done.output
    (tmp_path / "system.toml").unlink()
    scene.daemon.kill()
    assert CliRunner().invoke(main, ["config", "reload"]).exit_code == os.EX_UNAVAILABLE


# --- handlers, and the real finder -----------------------------------------------------------------------------


class Place:
    """A user's surroundings, in which a plugin of an echo is installed, and a daemon as `upcall daemon` starts it."""

    def __init__(self, folder: Path) -> None:
        above = folder.parent
        self.plugins, self.config = above / "plugins", above / "home" / "upcall" / "config.toml"
        self.plugins.mkdir()
        self.config.parent.mkdir(parents=True)
        (self.plugins / "echoing.py").write_text(
            "class Echo:\n"
            "    services = ('test.echo', 'test.later')\n"
            "    def lane(self, envelope): return envelope.service\n"
            "    def answer(self, envelope): return envelope.body\n"
            "echo = Echo()\n"
        )
        self.install("echo", "test.echo")
        self.environment = {
            "XDG_CONFIG_HOME": str(above / "home"),
            "XDG_RUNTIME_DIR": str(above / "run"),
            "PYTHONPATH": str(self.plugins),
        }

    def install(self, name: str, service: str) -> None:
        info = self.plugins / f"{name}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[upcall.handlers]\n{service} = echoing:echo\n")

    def allow(self, *names: str) -> None:
        self.config.write_text(f"[plugins]\nallow = {json.dumps(names)}\n")
        self.config.chmod(0o644)


def test_a_reload_adds_and_removes_handlers(folder: Path) -> None:
    place, broker = Place(folder), PlayedBroker(folder)
    (folder.parent / "run").mkdir(mode=0o700)
    arguments = ["-m", "upcall", "daemon", "--runtime", str(folder)]
    numbers = iter(range(1, 1000))

    def outcome(service: str) -> Answer | Refusal:
        broker.ask(next(numbers), b"hello", service)
        return broker.response().outcome

    def reloaded(count: int) -> None:
        daemon.signal(signal.SIGHUP)
        until(lambda: daemon.log.count(" configuration-reloaded ") == count, "reloaded")

    no_service = Refusal("no-service", 95)
    with Started(arguments, folder.parent / "daemon.log", place.environment) as daemon:
        broker.register()
        assert outcome("test.echo") == Answer(b"hello")
        place.allow("openssl")
        reloaded(1)
        assert outcome("test.echo") == no_service
        place.install("later", "test.later")
        place.allow("test.later", "test.echo")
        reloaded(2)
        assert outcome("test.echo") == outcome("test.later") == Answer(b"hello")
        place.config.write_text("[plugins]\nallow = ['test.echo'\n")
        daemon.signal(signal.SIGHUP)
        daemon.logged(f"{place.config}:2: ")
        assert outcome("test.later") == Answer(b"hello")
        place.config.unlink()
        reloaded(3)
        assert outcome("test.echo") == Answer(b"hello")


def test_the_finder_in_a_child_reports_findings_and_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    file = config.user_file()
    file.parent.mkdir()
    file.write_text('[plugins]\nallow = ["x25519", "openssl"]\n')
    overrides = Overrides(isolate=("openssl",))
    found = renewing.find_in_child(overrides)
    assert found == Discovered(finding.found(overrides), finding.locks())
    assert Module("openssl", "upcall_rsa:module", isolated=True) in found.plugins.modules
    assert found.plugins.overrides == overrides
    with pytest.raises(ModuleFailed, match="no key module 'nothing'"):
        renewing.find_in_child(Overrides(inline=("nothing",)))
    file.write_text("[plugins]\nallow = 1\n")
    with pytest.raises(ModuleFailed, match=f"{file}:2: plugins.allow: must be a list of names"):
        renewing.find_in_child(Overrides())


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import time; time.sleep(60)", "within 1 s"),
        ("1/0", "ZeroDivisionError"),
        ("print(1)", "an object is needed, not 1: restart the daemon"),
        ("", "not JSON"),
    ],
)
def test_a_finder_that_hangs_or_crashes_is_a_module_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, why: str
) -> None:
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}"\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(renewing, "PATIENCE", 1.0)
    with pytest.raises(ModuleFailed, match=why):
        renewing.find_in_child(Overrides())


# --- the key service -------------------------------------------------------------------------------------------


class Opening:
    """A module whose opening can be held up."""

    name, api = "toy", TOY.api

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()

    def open(self, signature: str, blob: bytes, secrets: object) -> object:
        self.begun.set()
        assert self.go_on.wait(PATIENCE)
        return TOY.open(signature, blob, secrets)  # type: ignore[arg-type]


def key_service(keyring: FolderKeyring, modules: Mapping[str, Callable[[], KeyModule]]) -> KeyHandler:
    return KeyHandler(keyring, modules, lambda *_: bytearray())


def denied() -> KeyModule:
    raise ModuleFailed("it is not allowed")


@pytest.mark.parametrize("held", ["open", "load"])
def test_a_key_that_was_opening_when_its_module_was_denied_is_refused(
    keyring: FolderKeyring, signature: str, held: str
) -> None:
    module = Opening()

    def load() -> KeyModule:
        if held == "load":
            module.begun.set()
            assert module.go_on.wait(PATIENCE)
        return module  # type: ignore[return-value]

    keys, errors = key_service(keyring, {"toy": load}), list[ModuleFailed]()

    def open_it() -> None:
        try:
            keys.opener.open(signature)
        except ModuleFailed as error:
            errors.append(error)

    thread = threading.Thread(target=open_it)
    thread.start()
    assert module.begun.wait(PATIENCE)
    keys.cache.use({"toy": denied}, set())
    module.go_on.set()
    thread.join(PATIENCE)
    assert [str(error) for error in errors] == ["it is not allowed"]
    assert keys.cache.status() == []


def test_a_module_that_stays_the_same_is_not_loaded_again(keyring: FolderKeyring, signature: str) -> None:
    count = iter(range(10))
    keys = key_service(keyring, {"toy": lambda: (next(count), TOY)[1]})
    first = keys.opener.open(signature)
    keys.cache.use(loaders([TOY_MODULE], lambda: 0.0, EventLog("test")), {"toy"})
    assert keys.opener.open(signature) is first
    keys.cache.use(loaders([TOY_MODULE], lambda: 0.0, EventLog("test")), set())
    assert keys.opener.open(signature) is not first
    assert next(count) == 1

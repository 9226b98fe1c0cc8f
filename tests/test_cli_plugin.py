"""`upcall plugin list`, `show`, `check` and `new`, on modules as an installer leaves them."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from upcall_x25519 import module as x25519

from upcall.core.errors import ModuleFailed, UsageError
from upcall.keymodule import Limits, Making
from upcall.keys.private_file import fingerprint
from upcall.protocols.request_key.key_types import KEY_TYPES
from upcall.testing.secrets import GivenSecrets
from upcall.testing.templates import HANDLER, KEY_MODULE, write_plugin
from upcall.testing.templates import SINK as SINK_KIND
from upcall.testing.templates.services import SERVICES
from upcall.testing.toy import make_toy_key

PROJECT = Path(__file__).parents[1]


class Site:
    """A folder of packages in PYTHONPATH, and a configuration."""

    def __init__(self, folder: Path) -> None:
        self.packages, self.config = folder / "site", folder / "config"
        self.packages.mkdir()

    def environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(self.packages), str(PROJECT)])
        return {**os.environ, "PYTHONPATH": path, "XDG_CONFIG_HOME": str(self.config), "COLUMNS": "200"}

    def run(self, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-X", "upcall-environment", "-m", "upcall", "plugin", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=self.environment(), timeout=timeout)

    def json(self, *arguments: str) -> Any:
        done = self.run(*arguments, "--json")
        assert done.returncode in (0, 1), done.stderr
        return json.loads(done.stdout)

    def broken(self, *arguments: str) -> dict[str, str]:
        """What `check` finds broken, and why."""
        return {one["check"]: one["why"] for one in self.json("check", *arguments) if one["outcome"] == "broken"}

    def install(self, package: str, alias: str, code: str | None = None, group: str = "upcall.key_modules") -> None:
        """What an installer would leave there. Without code: of a package that can be found already."""
        if code is not None:
            (self.packages / f"{package}.py").write_text(code)
        spec = f"{package}:module" if ":" not in package else package
        info = self.packages / f"{alias}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: of-{alias}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{alias} = {spec}\n")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


# --- list and show -------------------------------------------------------------------------------------------


def test_list_shows_plugins_without_loading_them(site: Site) -> None:
    site.install("explosive", "explosive", "raise SystemExit('loaded')")
    site.install("explosive2", "hand", "raise SystemExit('loaded')", "upcall.handlers")
    rows = {row["name"]: row for row in site.json("list")}
    assert rows["explosive"] == {
        "name": "explosive",
        "kind": "key module",
        "distribution": "of-explosive",
        "version": "1.2",
        "spec": "explosive:module",
        "isolated": False,
        "allowed": True,
    }
    assert rows["hand"]["kind"] == "handler"
    assert "of-explosive 1.2" in site.run("list").stdout


def test_show_prints_what_a_key_module_can_do_and_its_parameters(site: Site) -> None:
    told = site.json("show", "openssl")
    assert (told["api"], told["powers"]) == (1, ["open", "generate", "import"])
    assert told["parameters"][0]["choices"] == ["2048", "3072", "4096"]
    assert told["file"].endswith("upcall_rsa/__init__.py")
    text = site.run("show", "openssl").stdout
    assert "[2048 | 3072 | 4096; default 3072]" in text
    assert "passphrase   yes" in text


def test_show_prints_a_handlers_services(site: Site) -> None:
    code = "class module:\n    services = ('hand', 'quota')\n    lane = answer = print\n"
    site.install("hand", "hand", code, "upcall.handlers")
    assert site.json("show", "hand")["services"] == ["hand", "quota"]


@pytest.mark.parametrize("what", ["show", "check"])
def test_show_and_check_refuse_a_missing_broken_or_forbidden_plugin(site: Site, what: str) -> None:
    assert "there is no plugin 'nothing': " in site.run(what, "nothing").stderr
    site.install("explosive", "explosive", "raise RuntimeError('broken')")
    done = site.run(what, "explosive")
    assert "explosive:module: RuntimeError: broken" in done.stdout + done.stderr
    (site.config / "upcall").mkdir(parents=True)
    (site.config / "upcall" / "config.toml").write_text('[plugins]\nallow = ["openssl"]\n')
    done = site.run(what, "explosive")
    assert done.returncode == os.EX_USAGE
    assert "is installed, but not allowed" in done.stderr


# --- check ---------------------------------------------------------------------------------------------------


def test_check_of_a_sound_module_finds_nothing_broken(site: Site) -> None:
    site.install("tests.broken:BROKEN", "broken")
    done = site.run("check", "broken")
    assert done.returncode == 0, done.stdout
    assert "✓ garbage is refused\n" in done.stdout
    assert done.stdout.endswith("0 failed, 0 not applicable\n")


@pytest.mark.parametrize("what", ["openssl --param bits=2048", "x25519 --isolated", "passphrase --param passes=1"])
def test_check_of_our_own_plugins_finds_nothing_broken(site: Site, what: str) -> None:
    done = site.run("check", *what.split())
    assert done.returncode == 0, done.stdout
    apart = "in a process of its own it does the same: it is in one already" in done.stdout
    assert apart is ("--isolated" in what)


def test_check_names_the_broken_check_and_exits_with_1(site: Site) -> None:
    site.install("broken2", "broken", "from tests.broken import Module\nmodule = Module('never stale')\n")
    done = site.run("check", "broken")
    assert done.returncode == 1
    assert "✗ it is stale once its file has changed: another file is in the place of its own" in done.stdout
    assert ", 1 failed, " in done.stdout


CRASHES = """
import os, signal
from tests.broken import Key, Module
def unwrap(self, wrapped, unwrap=Key.unwrap):
    if wrapped == b"x":
        {what}
    return unwrap(self, wrapped)
Key.unwrap = unwrap
module = Module()
"""


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("os.abort()", "the process that had loaded it was killed by SIGABRT"),
        ("os._exit(3)", "it ended the process that had loaded it, with 3"),
        ("os.kill(os.getpid(), signal.SIGSTOP)", "it hangs with everything: not a word for 3 s"),
    ],
)
def test_a_plugin_that_crashes_or_hangs_breaks_only_the_check_that_met_it(site: Site, what: str, why: str) -> None:
    site.install("crashing", "broken", CRASHES.format(what=what))
    verdicts = site.json("check", "broken", "--timeout", "1" if "STOP" in what else "20")
    assert {one["check"]: one["why"] for one in verdicts if one["outcome"] == "broken"} == {"garbage_is_refused": why}
    assert len(verdicts) == len({one["check"] for one in verdicts}) == 36


@pytest.mark.parametrize(
    ("code", "check", "why"),
    [
        ("raise SystemExit(0)", "it_can_be_loaded", "SystemExit"),
        ("import os; os._exit(0)", "it_can_be_loaded", "it ended the process that had loaded it, with 0"),
        ("from tests.broken import Module\nmodule = Module('another version')", "it_can_be_loaded", "version 2"),
        ("from tests.broken import Module\nmodule = Module()\nmodule.name = 'other'", "it_can_be_loaded", "'other'"),
        ("class module:\n name, api, open = 'broken', 1, print", "a_key_can_be_made", "neither makes nor imports"),
        (
            "from tests.broken import Module\nmodule = Module()\nmodule.generate = lambda making: 1 / 0",
            "a_key_can_be_made",
            "raised ZeroDivisionError at ",
        ),
    ],
)
def test_a_module_that_cannot_load_or_make_a_key_fails_that_check_only(
    site: Site, code: str, check: str, why: str
) -> None:
    site.install("hopeless", "broken", code)
    broken = site.broken("broken")
    assert list(broken) == [check]
    assert why in broken[check]


def test_check_with_an_existing_key_leaves_its_file_unchanged(site: Site, tmp_path: Path) -> None:
    key, word = tmp_path / "key.pem", tmp_path / "word"
    making = Making(key, {"cipher": "aes-256-gcm"}, bytearray(b"its own passphrase"), "ask", Limits(), GivenSecrets())
    x25519.generate(making)
    word.touch(0o600)
    word.write_text("its own passphrase\n")
    before = fingerprint(key.stat())
    done = site.run("check", "x25519", "--file", str(key), "--passphrase-file", str(word))
    assert done.returncode == 0, done.stdout
    assert "✓ a wrong passphrase is refused" in done.stdout
    assert fingerprint(key.stat()) == before
    assert "wrong passphrase" in site.broken("x25519", "--file", str(key))["a_key_can_be_made"]


def test_a_module_that_makes_no_keys_is_checked_with_a_given_one(site: Site, tmp_path: Path) -> None:
    site.install("upcall.testing.toy:TOY", "toy")
    assert "must be given" not in site.broken("toy")["a_key_can_be_made"]
    signature, blob = make_toy_key(tmp_path / "toy.key")
    done = site.run("check", "toy", "--param", f"signature={signature}", "--param", f"blob={blob.hex()}")
    assert done.returncode == 0, done.stdout


def test_check_refuses_unknown_parameters_and_missing_files(site: Site) -> None:
    assert "there is no parameter 'nothing'" in site.run("check", "openssl", "--param", "nothing=1").stderr
    assert "does not exist" in site.run("check", "openssl", "--file", "/nowhere").stderr


BROKEN_HANDLER = """
class Handler:
    services = ("id_resolver",)
    def lane(self, envelope):
        return "lane"
    def answer(self, envelope):
        raise ZeroDivisionError("the authors own")
module = Handler()
"""


def test_check_of_a_handler_reports_what_is_broken(site: Site) -> None:
    site.install("hand", "id_resolver", BROKEN_HANDLER, "upcall.handlers")
    broken = site.broken("id_resolver")
    assert "nonsense_is_refused" in broken
    assert "raised ZeroDivisionError at " in broken["answers_are_bytes"]


@pytest.mark.parametrize("name", ["dns_resolver", "id_resolver", "cifs.idmap", "cifs.spnego", "quota"])
def test_check_of_our_own_handlers_finds_nothing_broken(site: Site, name: str) -> None:
    if name not in {row["name"] for row in site.json("list")}:
        pytest.skip(f"no handler of {name} is installed")
    done = site.run("check", name)
    assert done.returncode == 0, done.stdout
    assert ("it has no `explain`" in done.stdout) is (name == "quota")
    assert " passed, 0 failed, " in done.stdout


def test_check_of_a_handler_of_another_service_needs_a_request(site: Site, tmp_path: Path) -> None:
    code = BROKEN_HANDLER.replace("id_resolver", "echo").replace("raise ZeroDivisionError", "return bytes")
    code = code.replace('"the authors own"', "")
    site.install("hand", "echo", code, "upcall.handlers")
    done = site.run("check", "echo")
    assert done.returncode == os.EX_USAGE
    assert "--request-file" in done.stderr
    (tmp_path / "request").write_bytes(b"hello")
    assert "nonsense_is_refused" in site.broken("echo", "--request-file", str(tmp_path / "request"))
    (tmp_path / "request").write_bytes(bytes(65537))
    assert "more than 65536 bytes" in site.run("check", "echo", "--request-file", str(tmp_path / "request")).stderr


SINK = """
from upcall.core.errors import UsageError
from upcall.sink import TryLater
class Sink:
    def __init__(self, file):
        self.file = file
    def tell(self, notice, text):
        with open(self.file, "a") as file:
            file.write(text + "\\n")
class Module:
    name = "diary"
    def open(self, settings):
        if not isinstance(settings.get("file"), str):
            raise UsageError("quota.sink.diary.file: a path is needed")
        return Sink(settings["file"])
module = Module()
"""


def test_check_of_a_sink_uses_given_settings_and_those_of_the_configuration(site: Site, tmp_path: Path) -> None:
    site.install("diary", "diary", SINK, "upcall.sinks")
    file = tmp_path / "told"
    done = site.run("check", "diary", "--param", f"file={file}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("8 passed, 0 failed, 0 not applicable\n")
    assert "/home" in file.read_text()
    file.unlink()
    (site.config / "upcall").mkdir(parents=True)
    (site.config / "upcall" / "config.toml").write_text(f'[quota]\nsink.diary.file = "{file}"\n')
    assert site.run("check", "diary").returncode == 0
    assert file.exists()
    assert site.broken("diary", "--param", f"file={tmp_path}/none/told")["notices_are_told"].startswith(
        "`tell` raised FileNotFoundError at "
    )


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["id_resolver", "--isolated"], "is for key modules"),
        (["id_resolver", "--file", "/dev/null"], "--file is for key modules"),
        (["id_resolver", "--param", "a=b"], "it has no parameters"),
        (["openssl", "--request-file", "/dev/null"], "--request-file is for handlers"),
        (["diary", "--import"], "--import is for key modules"),
        (["diary", "--param", "file"], "are given as --param NAME=VALUE"),
    ],
)
def test_check_refuses_options_of_another_kind_of_plugin(site: Site, arguments: list[str], why: str) -> None:
    site.install("hand", "id_resolver", BROKEN_HANDLER, "upcall.handlers")
    site.install("diary", "diary", SINK, "upcall.sinks")
    done = site.run("check", *arguments)
    assert done.returncode == os.EX_USAGE
    assert why in done.stderr


def test_traceback_shows_the_authors_exception_on_standard_error(site: Site, tmp_path: Path) -> None:
    site.install("hand", "id_resolver", BROKEN_HANDLER, "upcall.handlers")
    site.install("explosive", "explosive", "raise RuntimeError('broken')")
    site.install("diary", "diary", SINK, "upcall.sinks")
    assert "ZeroDivisionError: the authors own" in site.run("check", "id_resolver", "--traceback").stderr
    assert site.run("check", "id_resolver").stderr == ""
    done = site.run("check", "explosive", "--traceback", "--json")
    assert "RuntimeError: broken" in done.stderr
    assert "Traceback" not in done.stdout
    done = site.run("show", "explosive", "--traceback")
    assert 'explosive.py", line 1, in <module>' in done.stderr
    assert done.stderr.splitlines()[-1].startswith("upcall: ")
    assert "Traceback" not in site.run("show", "explosive").stderr
    done = site.run("check", "diary", "--param", f"file={tmp_path}/none/told", "--traceback")
    assert "FileNotFoundError" in done.stderr


# --- new -----------------------------------------------------------------------------------------------------


def installed(site: Site, folder: Path, *arguments: str) -> str:
    """A project of `upcall plugin new`, built and installed offline without a change, and its own tests passed. What
    `new` says on standard error."""
    if tuple(map(int, version("setuptools").split(".")[:2])) < (70, 1):
        pytest.skip("needs setuptools 70.1 or newer, which builds wheels by itself")
    made = site.run("new", *arguments, "--folder", str(folder))
    assert made.returncode == 0, made.stderr
    options = ["--quiet", "--no-index", "--no-build-isolation", "--no-deps", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(site.packages), str(folder)]
    subprocess.run(command, check=True, timeout=120)
    command = [sys.executable, "-X", "upcall-environment", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    tested = subprocess.run(command, capture_output=True, text=True, env=site.environment(), timeout=120, cwd=folder)
    assert tested.returncode == 0, tested.stdout
    assert " passed" in tested.stdout
    return made.stderr


def test_a_new_key_module_installs_and_keeps_the_contract(site: Site, tmp_path: Path) -> None:
    installed(site, tmp_path / "project", "trial_1")
    assert (site.packages / "upcall_trial_1" / "py.typed").exists()
    checked = site.run("check", "trial_1")
    assert checked.returncode == 0, checked.stdout
    assert site.json("show", "trial_1")["powers"] == ["open", "generate"]
    assert "is taken: upcall-trial" in site.run("new", "trial_1").stderr


def test_a_handler_can_be_begun_for_every_type_of_keys() -> None:
    assert SERVICES.keys() == KEY_TYPES.keys()


@pytest.mark.parametrize("service", SERVICES)
def test_a_new_handler_installs_keeps_the_contract_and_answers_in_a_daemon(
    site: Site, tmp_path: Path, service: str
) -> None:
    said = installed(site, tmp_path / "project", "--handler", "trial_2", "--service", service)
    assert f"upcall plugin check {service}" in said
    checked = site.run("check", service)
    assert checked.returncode == 0, checked.stdout
    assert site.json("show", service)["distribution"] == "upcall-trial_2"


def test_a_new_sink_installs_and_keeps_the_contract(site: Site, tmp_path: Path) -> None:
    said = installed(site, tmp_path / "project", "--sink", "trial_3")
    assert "upcall plugin check trial_3 --param file=/tmp/trial_3" in said
    checked = site.run("check", "trial_3", "--param", f"file={tmp_path}/told")
    assert checked.returncode == 0, checked.stdout
    assert "/home" in (tmp_path / "told").read_text()
    assert "is taken: upcall-trial" in site.run("new", "--sink", "trial_3").stderr


def test_a_new_handler_of_a_service_that_is_answered_says_so(site: Site, tmp_path: Path) -> None:
    site.install("hand", "id_resolver", BROKEN_HANDLER, "upcall.handlers")
    done = site.run("new", "--handler", "mine", "--service", "id_resolver", "--folder", str(tmp_path / "mine"))
    assert done.returncode == 0
    assert "of-id_resolver answers 'id_resolver' here: uninstall it" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--handler", "--sink", "mine"], "a plugin is one of them"),
        (["--service", "dns_resolver", "mine"], "it needs --handler"),
        (["--handler", "mine", "--service", "dns_resolve"], "did you mean 'dns_resolver'"),
        (["--handler", "mine", "--service", "ecryptfs"], "cifs.idmap, cifs.spnego, dns_resolver, id_resolver can"),
    ],
)
def test_a_new_plugin_of_no_kind_is_refused(site: Site, tmp_path: Path, arguments: list[str], why: str) -> None:
    done = site.run("new", *arguments, "--folder", str(tmp_path / "new"))
    assert done.returncode == os.EX_USAGE
    assert why in done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("error", ["ValueError('Must be at least 16 bytes')", "InvalidUnwrap()"])
def test_the_new_key_module_refuses_whatever_cryptography_raises_at_a_wrapped_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    """Versions of cryptography differ in what they raise for one that was cut short."""
    write_plugin("mine", tmp_path / "new")
    monkeypatch.syspath_prepend(tmp_path / "new")
    monkeypatch.delitem(sys.modules, "upcall_mine", raising=False)
    mine = importlib.import_module("upcall_mine")

    def unwrap(secret: bytes, wrapped: bytes) -> bytes:
        raise eval(error, vars(mine))

    monkeypatch.setattr(mine, "aes_key_unwrap_with_padding", unwrap)
    with pytest.raises(ModuleFailed):
        mine.unwrap(bytes(32), b"short")
    monkeypatch.delitem(sys.modules, "upcall_mine")


@pytest.mark.parametrize("name", ["", "1st", "Upper", "with-dash", "a b", "x" * 17, "../up", "naïve"])
def test_an_invalid_plugin_name_is_refused_and_writes_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="1 to 16 of a-z"):
        write_plugin(name, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_new_plugin_does_not_overwrite_a_folder_that_holds_files(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(FileExistsError):
        write_plugin("mine", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("kind", "service"), [(KEY_MODULE, ""), (SINK_KIND, ""), *((HANDLER, service) for service in SERVICES)]
)
def test_a_new_plugin_has_no_placeholder_left_in_it(tmp_path: Path, kind: str, service: str) -> None:
    written = write_plugin("x" * 16, tmp_path / "new", kind, service)
    assert len(written) == 7
    assert not [path for path in written if re.search("@[A-Z]+@", f"{path} {path.read_text()}")]
    assert not [path for path in written if max(map(len, path.read_text().splitlines()), default=0) > 140]

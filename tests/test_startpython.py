"""Nothing that is planted in the environment or the working directory runs in the Python that root starts."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from upcall.process import start_python as startpython
from upcall.testing.processes import until

ROOT = Path(__file__).parents[1]
ATTACKER = 54321  # no account
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

# Each planted file leaves a line, of what it is and the uid that it ran as.
TELLS = 'import os\nwith open({mark!r}, "a") as file:\n    file.write({name!r} + f" {{os.geteuid()}}\\n")\n'
MODULES = ("sitecustomize", "usercustomize", "json", "click", "socket", "upcall/__init__", "startup", "upcall_rsa")


class Planted:
    """A folder of another uid's with what Python might take; `environment` points at it in every way there is."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark = folder, folder / "mark"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.site = folder / "base" / "lib" / version / "site-packages"
        for place in (folder, self.site):
            for name in MODULES:
                file = place / f"{name}.py"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(TELLS.format(mark=str(self.mark), name=name))
            (place / "planted.pth").write_text(f"import sys; exec(open({str(place / 'startup.py')!r}).read())\n")
        (folder / "bin").mkdir()
        for name in ("python", "python3", "systemctl", "udevadm", "pinentry", "env"):
            program = folder / "bin" / name
            program.write_text(f"#!/bin/sh\necho {name} $(id -u) >> {self.mark}\n")
            program.chmod(0o755)
        self.mark.touch()
        for path in (folder, *folder.rglob("*")):
            os.chown(path, ATTACKER, ATTACKER)
        self.environment = {
            "PYTHONPATH": str(folder),
            "PYTHONHOME": str(folder / "base"),
            "PYTHONUSERBASE": str(folder / "base"),
            "PYTHONSTARTUP": str(folder / "startup.py"),
            "PYTHONINSPECT": "1",
            "PYTHONBREAKPOINT": "startup.main",
            "PYTHONWARNINGS": "error::startup.W",
            "PATH": f"{folder / 'bin'}:/usr/bin:/bin",
            "HOME": str(folder),
            "XDG_RUNTIME_DIR": str(folder / "run"),
        }

    def ran(self) -> list[str]:
        return sorted(set(self.mark.read_text().splitlines()))


@pytest.fixture
def planted(folder: Path) -> Iterator[Planted]:
    made = folder.parent / "attacker"
    made.mkdir()
    yield Planted(made)


@pytest.fixture(autouse=True)
def guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As outside of tests."""
    monkeypatch.delitem(sys._xoptions, "upcall-environment", raising=False)


def started(planted: Planted, words: Sequence[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words,
        cwd=planted.folder,
        env={**planted.environment, **environment},
        input="",
        capture_output=True,
        text=True,
        timeout=60,
    )


# Each module that a process of ours starts, as `startpython.command` has it; arguments that end it early.
MODULES_STARTED = {
    "upcall.broker": ["nonsense"],
    "upcall.daemon": ["nonsense"],
    "upcall.kernel.genetlink": ["NONSENSE", "none"],
    "upcall.daemon.isolation": ["-1", "0", "upcall.testing.toy:TOY"],
    "upcall.daemon.plugin_discovery": [],
    "upcall.process.logind": ["0", "nonsense"],
    "upcall.keys.passphrase": ["0" * 16],
    "upcall.observe.doctor.plugins": ["upcall.key_modules", "openssl", "upcall_rsa:module"],
    "upcall.protocols.quota": ["nonsense"],
    "upcall.protocols.ecryptfs.mounting": ["nonsense"],
    "upcall.protocols.request_key.explain": [],
    "upcall.install.sessions": ["open"],
    "upcall.testing.checking": ["-1", "/nonexistent"],
    "upcall": ["plugin", "list"],
}


@AS_ROOT
@pytest.mark.parametrize("module", MODULES_STARTED)
def test_nothing_planted_runs_in_a_module_that_root_starts(planted: Planted, module: str) -> None:
    done = started(planted, startpython.command(module, *MODULES_STARTED[module]), {})
    assert "No module named" not in done.stderr, done.stderr
    assert planted.ran() == [], done.stderr


@AS_ROOT
def test_what_is_planted_would_run_without_the_option(planted: Planted) -> None:
    """The control: else the tests above show nothing."""
    del planted.environment["PYTHONHOME"]
    started(planted, [sys.executable, "-P", "-m", "upcall", "plugin", "list"], {})
    assert f"sitecustomize {os.geteuid()}" in planted.ran()


@AS_ROOT
@pytest.mark.parametrize("command", ["broker", "daemon"])
def test_the_units_own_lines_keep_the_option(planted: Planted, folder: Path, command: str) -> None:
    """`python -I -m upcall broker` executes another program, which must not see planted paths either."""
    words = [sys.executable, "-I", "-m", "upcall", command, "--runtime", str(folder)]
    words += ["--no-ecryptfs"] if command == "broker" else []
    folder.mkdir(exist_ok=True)  # a daemon's broker has made it
    (planted.folder / "run").mkdir(mode=0o700)
    log = folder.parent / "log"
    environment = {**planted.environment, "LD_LIBRARY_PATH": str(planted.folder), "GCONV_PATH": str(planted.folder)}
    with log.open("wb") as file:
        process = subprocess.Popen(words, cwd=planted.folder, env=environment, stderr=file)
    try:
        until(lambda: b"privileges-dropped" in log.read_bytes() or process.poll() is not None, "it is up", 60)
        shown = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")
        became = Path(f"/proc/{process.pid}/environ").read_bytes()
    finally:
        process.kill()
        process.wait()
    assert shown[1:4] == [b"-I", b"-m", f"upcall.{command}".encode()], log.read_text()
    assert planted.ran() == []
    for name in (b"PYTHON", b"LD_LIBRARY_PATH", b"GCONV_PATH", str(planted.folder / "bin").encode()):
        assert name not in became


def test_a_users_process_passes_on_its_options_and_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that was started with the user's own packages finds them again on SIGHUP, and in its children."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PYTHONPATH", "/mine")
    assert startpython.command("upcall.daemon", "x")[1:] == ["-P", "-m", "upcall.daemon", "x"]
    assert startpython.cleaned()["PYTHONPATH"] == "/mine"
    assert startpython.options(isolated=True) == ["-I"]
    for options, kept in ((["-I"], ["-I"]), (["-s"], ["-s", "-P"]), (["-E"], ["-E", "-P"])):
        code = (
            "import os; os.geteuid = lambda: 1000; from upcall.process.start_python import options; print(*options())"
        )
        done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.split() == kept


def test_no_environment_variable_turns_isolation_off_for_root(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os; os.geteuid = lambda: 0; "
    code += "from upcall.process.start_python import *; print(options(), sorted(cleaned()))"
    told = {"PYTHONSAFEPATH": "1", "PYTHONNOUSERSITE": "1", "UPCALL_ENVIRONMENT": "1", "LD_PRELOAD": "", "ENV": "x"}
    done = subprocess.run([sys.executable, "-c", code], env=told, capture_output=True, text=True, check=True)
    assert done.stdout.replace("'LC_CTYPE', ", "").strip() == "['-I'] ['PATH', 'UPCALL_ENVIRONMENT']"


# Who may name the interpreter, or Python's options, and what for.
ALLOWED = {
    "upcall/process/start_python.py": "builds the command lines",
    "upcall/process/trust.py": "looks whose it is",
    "upcall/protocols/request_key/forwarder/__init__.py": "the stand-in's own -I -S, in request-key.conf",
    "upcall/protocols/request_key/explain/child.py": "a message names it",
    "upcall/install/services.py": "writes it into units, with -I",
    "upcall/cli/setup.py": "the default of --python",
    "upcall/testing/lab/guest.py": "looks where it lies",
    "upcall/testing/processes.py": "starts tests' processes",
    "plugins/pkcs11/upcall_pkcs11/softhsm.py": "starts a test's token",
}


def test_no_other_place_starts_python() -> None:
    """A new one uses `startpython.command`."""
    found = set()
    for source in (*(ROOT / "upcall").rglob("*.py"), *(ROOT / "plugins").glob("*/upcall_*/**/*.py")):
        for node in ast.walk(ast.parse(source.read_text("utf-8"))):
            named = isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.executable"
            option = isinstance(node, ast.List | ast.Tuple) and any(
                isinstance(one, ast.Constant) and one.value in ("-P", "-I", "python", "python3") for one in node.elts
            )
            if named or option:
                found.add(str(source.relative_to(ROOT)))
    assert found <= ALLOWED.keys(), f"use upcall/process/start_python.py in {sorted(found - ALLOWED.keys())}"


def test_each_module_that_is_started_is_in_the_table_of_tested_modules() -> None:
    """`startpython.command(MODULE` in the source, against the table above."""
    started_modules = set()
    for source in (ROOT / "upcall").rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "startpython.command":
                started_modules |= {one.value for one in node.args[:1] if isinstance(one, ast.Constant)}
    assert started_modules <= MODULES_STARTED.keys()


def test_templates_start_python_isolated() -> None:
    for template in (ROOT / "upcall/install/units").iterdir():
        for line in template.read_text().splitlines():
            if "$python" in line:
                assert "$python -I -m" in line or "$python -- -I -m" in line, f"{template}: {line}"

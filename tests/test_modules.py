"""Finding key modules: by entry point, never in the working directory, and checked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from upcall.core.errors import ModuleFailed
from upcall.keys import plugins as modules

GOOD = "name = 'good'\napi = 1\ndef open(signature, blob, ask): ...\n"


def install(folder: Path, package: str, code: str, alias: str) -> None:
    """What an installer would leave there."""
    folder.mkdir(exist_ok=True)
    (folder / f"{package}.py").write_text("class module:\n " + code.replace("\n", "\n "))
    info = folder / f"{package}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[upcall.key_modules]\n{alias} = {package}:module\n")


def test_an_installed_key_module_is_found_and_loaded() -> None:
    found = modules.available()
    assert found["openssl"] == ("upcall_rsa:module", False)
    assert modules.load(found["openssl"].spec).name == "openssl"


def test_an_outsiders_module_is_found_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "outsider", GOOD, "good")
    install(tmp_path, "long", GOOD, "an-alias-of-more-than-16")
    monkeypatch.syspath_prepend(tmp_path)
    assert modules.available()["good"] == modules.Found("outsider:module", isolated=False)
    assert not [alias for alias in modules.available() if len(alias) > 16]
    assert modules.load("outsider:module").name == "good"


@pytest.mark.parametrize("start", [["-c"], ["-m"]])
def test_a_module_in_the_working_directory_is_neither_found_nor_loaded(tmp_path: Path, start: list[str]) -> None:
    install(tmp_path, "planted", GOOD, "planted")
    code = (
        "from upcall.keys import plugins as modules\n"
        "assert 'openssl' in modules.available() and 'planted' not in modules.available()\n"
        "try: modules.load('planted:module')\n"
        "except Exception as error: print(error)\n"
    )
    (tmp_path / "trial.py").write_text(code)
    command = [sys.executable, *start, code if start == ["-c"] else "trial"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "No module named 'planted'" in done.stdout


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (GOOD.replace("good", "n" * 17), "its name is not"),
        (GOOD.replace("name", "nom"), "its name is not"),
        (GOOD.replace("api = 1", "api = 2"), "written for version 2 of the protocol, this is 1"),
        (GOOD.replace("def open", "def close"), "cannot open keys"),
        ("raise RuntimeError('broken')\n", "RuntimeError: broken"),
    ],
)
def test_a_module_that_breaks_the_protocol_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, why: str
) -> None:
    name = f"bad{abs(hash(code))}"
    install(tmp_path, name, code, "bad")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleFailed, match=why):
        modules.load(f"{name}:module")


@pytest.mark.parametrize("spec", ["", "x", "x:", ":y", "x:y z", "nowhere:module", "upcall:nothing"])
def test_a_malformed_or_unknown_module_spec_is_refused(spec: str) -> None:
    with pytest.raises(ModuleFailed, match="key module"):
        modules.load(spec)


def test_finding_and_loading_modules_leave_sys_path_alone() -> None:
    before = sys.path[:]
    modules.available()
    with pytest.raises(ModuleFailed):
        modules.load("nowhere:module")
    assert sys.path == before


def test_metadata_is_not_imported_early() -> None:
    code = "import sys, upcall.keys.plugins; sys.exit('importlib.metadata' in sys.modules)"
    assert subprocess.run([sys.executable, "-I", "-c", code], timeout=60).returncode == 0

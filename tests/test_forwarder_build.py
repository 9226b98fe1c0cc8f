"""How the forwarder is built, found and named; C, Python and the package have one version."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from setuptools import Distribution  # type: ignore[import-untyped]

from upcall.protocols.request_key import forwarder
from upcall.protocols.request_key.forwarder import build, standin

PROJECT = Path(__file__).parents[1]
SOURCES = Path(forwarder.__file__).parent
needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="there is no C compiler")


def version() -> str:
    with (PROJECT / "pyproject.toml").open("rb") as file:
        return str(tomllib.load(file)["project"]["version"])


@needs_compiler
@pytest.mark.parametrize("flags", list(build.variants()), ids=["static", "dynamic", "plain"])
def test_every_variant_compiles_without_a_warning_and_runs(tmp_path: Path, flags: list[str]) -> None:
    program = tmp_path / "program"
    words = build.compiler()
    assert words is not None
    sources = [str(SOURCES / name) for name in build.SOURCES]
    subprocess.run([*words, *build.WARNINGS, "-Werror", *flags, "-o", str(program), *sources], check=True, timeout=60)
    told = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    assert told == f"upcall-request-key {version()}\n"


def test_the_python_stand_in_has_the_version_of_the_c_program() -> None:
    assert version() == standin.RELEASE
    assert f'#define RELEASE "{version()}"' in (SOURCES / "forward.c").read_text()


@needs_compiler
@pytest.mark.parametrize(("flags", "expected"), [(["-static"], True), (["-static-pie", "-fPIE"], True), ([], False)])
def test_a_program_is_static_if_no_loader_is_needed(tmp_path: Path, flags: list[str], expected: bool) -> None:
    words, program = build.compiler(), tmp_path / "program"
    assert words is not None
    (tmp_path / "program.c").write_text("int main(void) { return 0; }\n")
    done = subprocess.run([*words, *flags, "-o", program, tmp_path / "program.c"], capture_output=True, timeout=60)
    if done.returncode:
        pytest.skip(f"this compiler has no {flags}")
    assert build.is_static(program) is expected


@pytest.mark.parametrize("data", [b"", b"#!/bin/sh\n", b"\x7fELF\x09\x01" + bytes(80)])
def test_what_is_no_program_is_not_called_static(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "program").write_bytes(data)
    assert not build.is_static(tmp_path / "program")


@needs_compiler
@pytest.mark.parametrize(
    ("static", "expected"),
    [(True, "manylinux_2_17_{0}.manylinux2014_{0}"), (False, "linux_{0}")],
    ids=["static", "dynamic"],
)
def test_a_wheel_is_for_every_linux_only_if_its_programs_are_static(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, static: bool, expected: str
) -> None:
    monkeypatch.setattr(build, "is_static", lambda _: static)
    command = build.BdistWheel(Distribution({"name": "upcall"}))
    command.finalize_options()
    command.bdist_dir = str(tmp_path)
    folder = tmp_path / build.FOLDER
    folder.mkdir(parents=True)
    assert command.get_tag()[2] == "any"
    (folder / build.PROGRAM).touch()
    assert command.get_tag()[2] == expected.format(os.uname().machine)


@needs_compiler
def test_the_build_makes_a_program_that_only_its_owner_writes(tmp_path: Path) -> None:
    target = tmp_path / "upcall-request-key"
    assert build.compile_program(target, SOURCES) is not None
    assert stat.S_IMODE(target.stat().st_mode) == 0o755
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("cc", ["false", "true", "/nowhere/cc"])
def test_a_build_without_a_compiler_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cc: str
) -> None:
    monkeypatch.setenv("CC", cc)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("false", "true"):
        found = shutil.which(name)
        assert found is not None
        (tools / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(tools))
    assert build.compile_program(tmp_path / "program", SOURCES) is None
    assert "is not compiled, its stand-in in Python will do" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_a_program_of_another_machine_is_skipped_for_the_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = tmp_path / "upcall-request-key"
    foreign.write_bytes(b"\x7fELF nonsense")
    foreign.chmod(0o755)
    monkeypatch.setattr(forwarder, "PROGRAM", foreign)
    assert forwarder.program() == forwarder.STANDIN
    interpreter, *rest = forwarder.command()
    assert Path(interpreter).is_absolute()
    assert rest == ["-I", "-S", str(forwarder.STANDIN)]


def test_without_a_system_python_the_stand_in_runs_with_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwarder, "PROGRAM", tmp_path / "none")
    monkeypatch.setattr(forwarder, "SYSTEM_PYTHON", tmp_path / "python3")
    assert forwarder.command()[0] == os.path.realpath(sys.executable)


def test_the_forwarders_command_runs_and_exits_without_authority() -> None:
    """Started by hand, it has no authorisation key."""
    words = forwarder.command()
    assert all(re.fullmatch(r"[!-~]+", word) for word in words)
    ended = subprocess.run([*words, "1"], capture_output=True, timeout=60)
    assert ended.returncode == 77

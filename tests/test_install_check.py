"""What `make dist-install-check` does: it installs the wheels into clean environments, and uses them."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from release import install_check
from release.install_check import LOWEST, NEWEST, PLUGINS, SETS, CheckFailed, Requirement, fetch, requirements

ROOT = Path(__file__).parents[1]


def wheel(folder: Path, name: str, *dependencies: str) -> None:
    """A wheel that has nothing but its metadata."""
    text = f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n"
    text += "".join(f"Requires-Dist: {one}\n" for one in dependencies)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}-1.0.dist-info/METADATA", text)


def test_requirements_are_those_of_all_wheels_and_extras_but_not_the_developers(tmp_path: Path) -> None:
    wheel(tmp_path, "upcall", "click>=8.1", 'a_b>=0.20; extra == "metrics"', 'mypy>=1.10; extra == "dev"')
    wheel(tmp_path, "upcall_dns", "upcall==1.0", "dnspython>=2.6.1", 'pytest>=8; extra == "test"')
    assert requirements(tmp_path) == [
        Requirement("a_b", "0.20"),
        Requirement("click", "8.1"),
        Requirement("dnspython", "2.6.1"),
    ]


@pytest.mark.parametrize(("resolution", "pins"), [(NEWEST, ""), (LOWEST, "click==8.1\nrich==13\n")])
def test_the_lowest_versions_are_pinned_when_wheels_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resolution: str, pins: str
) -> None:
    commands: list[list[str]] = []

    def run(command: list[object], folder: Path) -> str:
        commands.append([str(word) for word in command])
        return ""

    monkeypatch.setattr(install_check, "run", run)
    wheel(tmp_path, "upcall", "click>=8.1", "rich>=13")
    target = tmp_path / "others"
    target.mkdir()
    fetch(tmp_path, target, resolution, "python")
    assert (target / "constraints.txt").read_text() == pins
    assert commands[0][-2:] == ["click>=8.1", "rich>=13"]
    assert commands[0][commands[0].index("-c") + 1] == str(target / "constraints.txt")


def test_a_command_that_fails_is_named_with_what_it_printed(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match=r"(?s)exit code 3.*on stdout.*on stderr"):
        code = "import sys; print('on stdout'); print('on stderr', file=sys.stderr); sys.exit(3)"
        install_check.run([sys.executable, "-c", code], tmp_path)


def test_a_set_that_fails_is_reported_and_the_next_one_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        def __init__(self, folder: Path, python: str, wheels: object, extras: str) -> None:
            if extras == "dns":
                raise CheckFailed("no such package")

        def check(self, extras: str) -> list[str]:
            return ["everything"]

    monkeypatch.setattr(install_check, "Installed", Broken)
    monkeypatch.setattr(install_check, "fetch", lambda *_: "no compiler")
    failures = install_check.check(tmp_path, ["base", "dns", "quota", "tpm2"], [NEWEST], "python")
    assert failures == ["newest dns: no such package"]
    assert capsys.readouterr().out.splitlines() == [
        "newest base     everything",
        "newest dns      FAILED: no such package",
        "newest quota    everything",
        "newest tpm2     left out: no compiler",
    ]


def test_every_extra_is_checked() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys() - {"dev"}
    assert set(SETS) == extras | {"base"}
    assert set(PLUGINS) == set(SETS) - {"all"}


@pytest.mark.long
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the repository, not only its files")
def test_wheels_work_in_clean_environments_with_the_newest_and_the_lowest_dependencies() -> None:
    command = [sys.executable, "-m", "release.install_check", "base", "all"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        [resolution, extras] for resolution in (NEWEST, LOWEST) for extras in ("base", "all")
    ]

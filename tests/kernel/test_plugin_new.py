"""docs/plugin-guide.md, done: a plugin from `upcall plugin new`, changed in its two verbs only, on real eCryptfs.

It is installed into the very environment that runs this: in the guest that is a scratch layer.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.guide import snippet, with_verbs

NAME = "sealed"


def run(*command: str, folder: Path, timeout: float = 900) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def upcall(*arguments: str) -> Sequence[str]:
    return [sys.executable, "-P", "-m", "upcall", *arguments]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The plugin's project, installed."""
    folder = tmp_path_factory.mktemp("guide")
    run(*upcall("plugin", "new", NAME), folder=folder)
    source = folder / f"upcall-{NAME}" / f"upcall_{NAME}" / "__init__.py"
    source.write_text(with_verbs(source.read_text()))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    options = ["--no-index", "--no-build-isolation", "--no-deps"]
    run(*pip, "install", *options, f"./upcall-{NAME}", folder=folder)
    yield folder / f"upcall-{NAME}"
    run(*pip, "uninstall", "--yes", f"upcall-{NAME}", folder=folder)


def test_a_plugin_made_by_the_guide_keeps_the_contract(project: Path) -> None:
    said = run(*upcall("plugin", "check", NAME), folder=project)
    assert ", 0 failed, " in said


def test_a_plugin_made_by_the_guide_writes_and_reads_on_ecryptfs(project: Path) -> None:
    (project / "mount_it.py").write_text(snippet("mount"))
    said = run(sys.executable, "mount_it.py", folder=project)
    assert said == "written, unmounted, mounted again and read: what only alice may read\n"

"""docs/plugin-guide.md, done step by step on plugins from `upcall plugin new`: its examples and its listings are true.

What it does on a real kernel: tests/kernel/test_plugin_new.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.guide import GUIDE, snippet, with_verbs
from upcall.testing.templates import HANDLER, SINK, write_plugin

PROJECT = Path(__file__).parents[1]


def outcome(project: Path) -> tuple[int, str]:
    """Runs the project's tests, as its author does. Exit code, and what pytest prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(project), str(PROJECT)])}
    command = [
        sys.executable,
        "-X",
        "upcall-environment",
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(project),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=project, timeout=300)
    return done.returncode, done.stdout


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """The guide's key module, with its verbs."""
    write_plugin("sealed", tmp_path / "sealed")
    source = tmp_path / "sealed" / "upcall_sealed" / "__init__.py"
    source.write_text(with_verbs(source.read_text()))
    return tmp_path / "sealed"


def test_the_guides_verbs_fail_the_known_answers_of_the_template_as_it_says(sealed: Path) -> None:
    code, said = outcome(sealed)
    assert code == pytest.ExitCode.TESTS_FAILED
    assert set(re.findall(r"^FAILED tests/(\w+)\.py", said, re.MULTILINE)) == {"test_sealed_verbs"}


def test_the_guides_verbs_and_tests_pass_in_the_contract_and_in_a_daemon(sealed: Path) -> None:
    (sealed / "tests" / "test_sealed_verbs.py").write_text(snippet("verbs-test"))
    (sealed / "tests" / "test_sealed_contract.py").write_text(snippet("contract-test"))
    (sealed / "tests" / "test_sealed_daemon.py").write_text(snippet("daemon-test"))
    code, said = outcome(sealed)
    assert code == 0, said
    assert re.search(r"\b3[0-9] passed", said)


def test_the_guides_handler_contract_is_kept_by_a_new_handler(tmp_path: Path) -> None:
    write_plugin("hosts", tmp_path / "hosts", HANDLER, "dns_resolver")
    (tmp_path / "hosts" / "tests" / "test_hosts_contract.py").write_text(snippet("handler-test"))
    code, said = outcome(tmp_path / "hosts")
    assert code == 0, said


def test_the_guides_sink_passes_the_tests_of_a_new_sink(tmp_path: Path) -> None:
    write_plugin("diary", tmp_path / "diary", SINK)
    (tmp_path / "diary" / "upcall_diary" / "__init__.py").write_text(snippet("sink"))
    code, said = outcome(tmp_path / "diary")
    assert code == 0, said


def test_the_guide_lists_the_files_that_are_written(tmp_path: Path) -> None:
    written = [str(path.relative_to(tmp_path)) for path in write_plugin("sealed", tmp_path / "upcall-sealed")]
    assert "$ upcall plugin new sealed\n" + "\n".join(written) + "\n" in GUIDE.read_text()

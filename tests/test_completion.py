"""Completion, in the shells themselves: a line is typed, and a tab."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from upcall.cli import COMMANDS, main
from upcall.install.completion import FILES, script

SIGNATURE = "0123456789abcdef"
ENTRY = f"""module = "openssl"
signature = "{SIGNATURE}"
source = "ask"
description = "RSA-3072"
created = 2026-01-31T12:00:00Z
blob = "YQ=="
"""
PATIENCE = 60  # seconds


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of a user with the keys `work` and `worn`, and upcall in PATH."""
    program = tmp_path / "bin/upcall"
    program.parent.mkdir()
    called = f"{sys.executable} -P -c \"from upcall.cli import main; main(prog_name='upcall')\""
    program.write_text(f'#!/bin/sh\nexec {called} "$@"\n')
    program.chmod(0o755)
    keys = tmp_path / "data/upcall/keys"
    keys.mkdir(parents=True, mode=0o700)
    for name in ("work.toml", "worn.toml"):
        (keys / name).touch(0o600)
    (keys / "work.toml").write_text(ENTRY)
    for shell in FILES:
        (tmp_path / shell).write_text(script(shell))
    return {
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "HOME": str(tmp_path),
        "XDG_DATA_HOME": str(tmp_path / "data"),
        "TERM": "dumb",
        "LANG": "C.UTF-8",
    }


def asked(environment: dict[str, str], line: str, before: str = "pass") -> subprocess.CompletedProcess[str]:
    """What upcall itself tells bash about this line, whose last word goes on."""
    words = {"_UPCALL_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    code = f"{before}; from upcall.cli import main; main(prog_name='upcall')"
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=environment | words,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def offered(environment: dict[str, str], line: str) -> list[str]:
    done = asked(environment, line)
    assert done.stderr == ""
    return [said.partition(",")[2] for said in done.stdout.split()]


# --- what is offered -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("upcall ", list(COMMANDS)),
        ("upcall do", ["doctor"]),
        ("upcall key exp", ["export-public"]),
        ("upcall key add wo", ["work", "worn"]),
        ("upcall key show 0123", [SIGNATURE]),
        ("upcall unwrap w", ["work", "worn"]),
        ("upcall key generate ", []),  # a new name is nobody's to guess
        ("upcall key generate --module op", ["openssl"]),
        ("upcall plugin show x", ["x25519"]),
        ("upcall log --service cifs.s", ["cifs.spnego"]),
        ("upcall log --outcome daemon-", ["daemon-gone", "daemon-full"]),
        ("upcall explain d", ["dns_resolver"]),
        ("upcall config show request-key.cifs.spnego.w", ["request-key.cifs.spnego.without-daemon"]),
        ("upcall quota status --user roo", ["root"]),
        ("upcall quota test --sink term", ["terminal"]),
        ("upcall manual met", ["metrics"]),
        ("upcall status --js", ["--json"]),
        ("upcall --vers", ["--version"]),
        ("upcall nonsense ", list(COMMANDS)),
    ],
)
def test_a_partial_line_is_completed_with_the_right_words(
    environment: dict[str, str], line: str, wanted: list[str]
) -> None:
    assert offered(environment, line) == wanted


def test_an_unreadable_key_folder_offers_nothing_and_prints_nothing(
    environment: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "data/upcall/keys"
    shutil.rmtree(folder)
    folder.write_text("no folder")
    assert offered(environment, "upcall key add ") == []


@pytest.mark.parametrize("line", ["upcall ", "upcall ke"])
def test_completing_command_names_imports_no_command(environment: dict[str, str], line: str) -> None:
    """Imports dominate the cost: some commands need libraries that take a second to import."""
    tell = "import atexit, sys; atexit.register(lambda: print(*sys.modules, sep='\\n', file=sys.stderr))"
    loaded = asked(environment, line, tell).stderr.split()
    assert "upcall.cli" in loaded
    own = {"upcall.cli.commands", "upcall.cli.output", "upcall.cli.running"}
    assert {name for name in loaded if name.startswith("upcall.cli.")} == own
    assert not {"rich", "difflib", "traceback"}.intersection(loaded)


@pytest.mark.parametrize("line", ["upcall key add ", "upcall wrap ", "upcall log --service "])
def test_completing_key_names_imports_no_heavy_library(environment: dict[str, str], line: str) -> None:
    tell = "import atexit, sys; atexit.register(lambda: print(*sys.modules, sep='\\n', file=sys.stderr))"
    loaded = asked(environment, line, tell).stderr.split()
    assert {"rich", "cryptography", "keyring", "pyroute2"}.isdisjoint(loaded)


# --- the shells ----------------------------------------------------------------------------------------------------


class Shell:
    """A shell on a terminal of its own."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.seen = ""
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            os.execvpe(command[0], command, environment)

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait(self, pattern: str) -> None:
        """Until this has come, as it is to be seen: without what moves the cursor."""
        until = time.monotonic() + PATIENCE
        while not re.search(pattern, self.seen):
            ready, _, _ = select.select([self._fd], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"{pattern!r} did not come: {self.seen[-2000:]!r}"
            shown = os.read(self._fd, 4096).decode("utf-8", "replace")
            self.seen = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]|\x07|.\x08", "", self.seen + shown)

    def close(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._fd)


STARTS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], "PS1='ready''> '; source ~/bash\n"),
    "zsh": (["zsh", "-f", "-i"], "PS1='ready''> '; autoload -U compinit; compinit -u -D; source ~/zsh\n"),
}


@pytest.fixture(params=STARTS)
def shell(request: pytest.FixtureRequest, environment: dict[str, str]) -> Iterator[Shell]:
    command, first = STARTS[request.param]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed (Debian: {command[0]})")
    started = Shell(command, environment)
    started.type(first)
    started.wait(r"ready> ")
    yield started
    started.close()


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("upcall doc", "upcall doctor "),
        ("upcall key exp", "upcall key export-public "),
        ("upcall key lock wo", "upcall key lock wor"),
        ("upcall wrap 0123", f"upcall wrap {SIGNATURE} "),
    ],
)
def test_tab_completes_a_line_in_the_shell(shell: Shell, typed: str, completed: str) -> None:
    shell.type(f"{typed}\t")
    shell.wait(completed)


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed (Debian: fish)")
@pytest.mark.parametrize(
    ("typed", "wanted"),
    [("upcall doc", ["doctor"]), ("upcall key add wo", ["work", "worn"]), ("upcall wrap 01", [SIGNATURE])],
)
def test_fish_is_offered_the_right_words(environment: dict[str, str], typed: str, wanted: list[str]) -> None:
    told = ["fish", "--no-config", "-c", f"source ~/fish; complete -C '{typed}'"]
    done = subprocess.run(told, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert [line.partition("\t")[0] for line in done.stdout.splitlines()] == wanted, done.stderr


@pytest.mark.parametrize("shell", FILES)
def test_the_command_prints_what_setup_installs(shell: str) -> None:
    done = CliRunner().invoke(main, ["completion", shell])
    assert done.exit_code == 0 and done.output == script(shell)
    assert "_UPCALL_COMPLETE" in done.output


def test_completion_for_an_unknown_shell_is_a_usage_error() -> None:
    assert CliRunner().invoke(main, ["completion", "csh"]).exit_code == os.EX_USAGE

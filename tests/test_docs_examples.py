"""Every example in the documentation is run, or checked as far as it can be without root and other machines.

- Consoles: all commands of a page run in one session, in order, as an ordinary user with a broker and a daemon. Output
  that the page shows must come, in this order; numbers, signatures and paths may differ. Root's commands (`#`) are
  parsed only.
- Python runs in the same session, where it stands in the page.
- TOML must be a valid configuration.

What cannot be run here is named in ELSEWHERE, with the test that runs it.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tests.documents import PAGES, ROOT, Block, Command, blocks, commands, shown, without_blocks, words_of, wrong_call
from tests.scratch_session import Session, missing, session
from upcall.cli import main
from upcall.config.files import Source
from upcall.config.layers import Said
from upcall.install.manual.commands import take

# (page, first line of the block) -> the test that runs it instead.
ELSEWHERE: dict[tuple[str, str], str] = {
    ("docs/observing.md", "$ upcall doctor --quiet"): "tests/test_doctor_broken.py",
    ("docs/observing.md", "$ upcall status"): "tests/test_cli_status.py",
    (
        "docs/plugin-guide.md",
        "from upcall.testing.contract import KeyModuleContract",
    ): "tests/kernel/test_plugin_new.py",
}

# Pages whose blocks belong together, and are run by one test of the lab. Consoles are parsed, Python is compiled.
PAGES_ELSEWHERE = {"docs/plugin-guide.md": "tests/kernel/test_plugin_new.py"}

# Commands of an ordinary user that need another machine, a kernel with eCryptfs, a network or a clone's environment.
# They are parsed here; the test beside them runs them, or what they call.
NOT_RUN: dict[str, str] = {
    r"make [\w-]+": "Makefile",
    r"(\.venv/bin/)?python -m (bench|fuzz|pytest|release)\b": "Makefile",
    r"pytest ": "Makefile",
    r"pipx |python3 -m venv|~/upcall/bin/": "tests/test_install_check.py",
    r"python plugins/quota/tests/notification_picture\.py": "plugins/quota/tests/notification_picture.py",
    r"kinit": "tests/kernel/test_cifs.py",
    r"keyctl request2 dns_resolver": "tests/kernel/test_dns_resolver.py",
    r"systemctl --user": "tests/kernel/test_units.py",
    r"upcall (mount|umount)\b|echo secret >~/private": "tests/kernel/test_mount.py",
    r"upcall ecryptfs (cat|rewrap)": "tests/kernel/test_rewrap.py",
    r"upcall lab ": "tests/test_lab.py",
    r"upcall key restore (?!.*--list)": "tests/test_key_backup.py",
    r"upcall log .*/var/log": "tests/test_cli_log.py",
    r"upcall quota watch": "tests/kernel/test_quota_ext4_looking.py",
    r"upcall key import .*\.ecryptfs": "tests/test_cli_key.py",
    r"upcall key import .*--module pkcs11": "plugins/pkcs11/tests/test_pkcs11_enrolment.py",
    r"upcall key generate .*--module pkcs11": "plugins/pkcs11/tests/test_pkcs11_enrolment.py",
    r"upcall key generate .*--module tpm2": "plugins/tpm2/tests/test_tpm2_keys.py",
    r"tpm2_": "plugins/tpm2/tests/test_tpm2_keys.py",
}

# What root's commands begin with, besides upcall.
ROOTS_PROGRAMS = frozenset(
    [
        "apt",
        "apt-get",
        "install",
        "echo",
        "keyctl",
        "ln",
        "modprobe",
        "mount",
        "printf",
        "python3",
        "rm",
        "systemctl",
        "usermod",
    ]
)

# Commands that succeed with another status than 0 here, and why.
STATUS = {
    "upcall doctor": {0, 1},  # 1: there is something to do, as on any machine without services
    "upcall explain": {0, 1},  # 1: it would not be answered: no ticket, no request-key lines
    "upcall quota": {0, 69},  # 69: not every sink works: no desktop
}

# What a page takes for granted: run first.
BEFORE: dict[str, str] = {
    "docs/backup.md": "upcall key generate work",
    "docs/refusals.md": "upcall key generate work && echo secret | upcall wrap work > key.wrapped; upcall lock",
    "docs/keys.md": "upcall key generate default",
}


def blocks_of(language: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language == language]


def elsewhere(block: Block) -> str | None:
    return PAGES_ELSEWHERE.get(block.page) or ELSEWHERE.get((block.page, block.first))


def not_run(command: Command) -> str | None:
    return next((test for begin, test in NOT_RUN.items() if re.match(begin, command.text)), None)


def runnable(page: Path) -> list[Block]:
    """The blocks of a page that run here."""
    return [block for block in blocks(page) if block.language in ("console", "python") and not elsewhere(block)]


# --- every block is of a kind that is checked ------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_block_says_what_it_is(page: Path) -> None:
    for block in blocks(page):
        assert block.language in ("console", "python", "toml", "json"), (
            f"{block}: a fence without a language that is checked"
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_command_hides_in_an_indented_block(page: Path) -> None:
    hidden = re.compile(r"^ {4,}(?:[$#] |(?:sudo |python3? -m )?(?:upcall|pip|pipx|apt|apt-get|pytest|make) )")
    lines = [line for line in without_blocks(page).splitlines() if "-->" not in line]  # drawings
    found = [line.strip() for line in lines if hidden.match(line)]
    assert found == [], f"{page.name}: write them as ```console"


def test_every_target_of_make_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for block in blocks_of("console"):
        for command in commands(block):
            if found := re.match(r"make ([\w-]+)", command.text):
                assert found[1] in targets, f"{block}: {command.text}"


def test_what_runs_elsewhere_is_there_and_its_test_too() -> None:
    known = {(block.page, block.first) for page in PAGES for block in blocks(page)}
    for test in PAGES_ELSEWHERE.values():
        assert (ROOT / test).exists(), f"there is no {test}"
    for key, test in ELSEWHERE.items():
        assert key in known, f"{key}: there is no such block any more"
        assert (ROOT / test).exists(), f"{key}: there is no {test}"
    texts = [command.text for block in blocks_of("console") for command in commands(block)]
    for begin, test in NOT_RUN.items():
        assert any(re.match(begin, text) for text in texts), f"{begin}: no page has such a command any more"
        assert (ROOT / test).exists(), f"{begin}: there is no {test}"


# --- consoles --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", blocks_of("console"), ids=str)
def test_commands_of_a_console_are_parsed(block: Block) -> None:
    for command in commands(block):
        assert wrong_call(command.text) is None, f"{block}: {command.text}"
        if command.root:
            for words in words_of(command.text):
                name = Path(words[0]).name
                assert name in ("upcall", "pip") or name in ROOTS_PROGRAMS, (
                    f"{block}: {words[0]} is not in ROOTS_PROGRAMS"
                )


@pytest.fixture
def shell() -> Iterator[Session]:
    if why := missing():
        pytest.skip(why)
    with session() as made:
        yield made


@pytest.mark.parametrize(
    "page", [page for page in PAGES if runnable(page)], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_the_examples_of_a_page_work(page: Path, shell: Session) -> None:
    if before := BEFORE.get(page.relative_to(ROOT).as_posix()):
        assert shell.run(before).status == 0
    for block in runnable(page):
        if block.language == "python":
            (shell.folder / "example.py").write_text(block.text)
            ran = shell.run(f"python {shell.folder}/example.py")
            assert ran.status == 0, f"{block}: " + "\n".join(ran.output)
            continue
        run_console(shell, block)


def run_console(shell: Session, block: Block) -> None:
    """Runs a console's commands. `echo $?` shows the status that the command before it must have."""
    shown_status = "echo $?"
    these = commands(block)
    for command, following in zip(these, [*these[1:], Command(False, "", ())], strict=True):
        if command.root or not_run(command) or command.text == shown_status:
            continue
        ran = shell.run(command.text)
        said = "\n".join(ran.output)
        statuses = STATUS.get(" ".join(command.text.split()[:2]), {0})
        if following.text == shown_status:
            statuses = {int(following.output[0])}
        assert ran.status in statuses, f"{block}: {command.text}: status {ran.status}\n{said}"
        lacking = shown(command, ran.output)
        assert lacking is None, f"{block}: {command.text}: no line like {lacking!r} in\n{said}"


@pytest.mark.parametrize("block", blocks_of("python"), ids=str)
def test_python_compiles(block: Block) -> None:
    compile(block.text, str(block), "exec")


@pytest.mark.parametrize("block", blocks_of("json"), ids=str)
def test_json_can_be_parsed(block: Block) -> None:
    json.loads(block.text)


# --- TOML ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", blocks_of("toml"), ids=str)
def test_toml_is_a_valid_configuration_or_part_of_a_project(block: Block, tmp_path: Path) -> None:
    if block.text.startswith("[project"):
        project = tomllib.loads(block.text)
        for group in project["project"]["entry-points"]:
            assert group in ("upcall.key_modules", "upcall.handlers", "upcall.sinks", "upcall.isolated")
        return
    problems = Said(Source(tmp_path / "config.toml", "system"), block.text).problems
    assert [str(problem) for problem in problems] == []


# --- --help ----------------------------------------------------------------------------------------------------


def all_commands(context: click.Context, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield context.command_path, command
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from all_commands(click.Context(inner, info_name=name, parent=context), inner)


def examples() -> list[tuple[str, str]]:
    found = []
    for path, command in all_commands(click.Context(main, info_name="upcall"), main):
        for line in take(command.help or "").examples.splitlines():
            found.append((path, line.strip()))
    return found


@pytest.mark.parametrize(("path", "line"), examples())
def test_examples_of_the_help_are_parsed(path: str, line: str) -> None:
    assert line[:2] in ("$ ", "# "), f"{path}: {line}"
    assert wrong_call(line[2:]) is None, f"{path}: {line}"

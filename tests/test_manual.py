"""Manual pages: every command, option and key has its place in one, and man takes them without a word."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from upcall.cli import COMMANDS, main, running
from upcall.config.keys import TABLES
from upcall.config.shown import as_toml
from upcall.config.table import ANY
from upcall.install.manual import about, files
from upcall.install.manual.commands import page_name, section, take
from upcall.install.manual.roff import Items, Page, Paragraph, Verbatim, bold, render, words
from upcall.install.manual.written import pages, written
from upcall.keys import store as keystore

ROOT = Path(__file__).parents[1]
LISTED = 59  # characters of a short help that click shows in 80 columns beside the longest name


def walk(ctx: click.Context, command: click.Command) -> Iterator[tuple[click.Context, click.Command]]:
    yield ctx, command
    if isinstance(command, click.Group):
        for name in command.list_commands(ctx):
            found = command.get_command(ctx, name)
            assert found is not None, name
            yield from walk(click.Context(found, info_name=name, parent=ctx), found)


TREE = {ctx.command_path: (ctx, command) for ctx, command in walk(click.Context(main, info_name="upcall"), main)}
everywhere = pytest.mark.parametrize("path", TREE)


def source(path: str) -> str:
    """Of the page, as it reads: without fonts and escapes."""
    ctx, _ = TREE[path]
    return plain(written(main)[f"man{section(ctx)}/{page_name(ctx)}.{section(ctx)}"])


def plain(text: str) -> str:
    text = re.sub(r"\\f[BIR]", "", text)
    for escape, character in (
        (r"\-", "-"),
        (r"\(aq", "'"),
        (r"\(dq", '"'),
        (r"\(ti", "~"),
        (r"\&", ""),
        (r"\e", "\\"),
    ):
        text = text.replace(escape, character)
    return text


# --- the whole tree ------------------------------------------------------------------------------------------------


@everywhere
def test_every_command_has_a_page_with_each_of_its_options(path: str) -> None:
    _, command = TREE[path]
    text = source(path)
    assert f"\n{path} " in text
    for param in command.params:
        if isinstance(param, click.Option) and not param.hidden:
            assert param.help, f"{path} {param.name}: no help"
            for name in (*param.opts, *param.secondary_opts):
                assert re.search(rf"^(.*[ ,/])?{re.escape(name)}([ ,/].*)?$", text, re.MULTILINE), name
            assert " ".join(param.help.split())[:40].replace("`", "") in text


@everywhere
def test_every_help_begins_with_a_sentence_and_mentions_its_arguments(path: str) -> None:
    _, command = TREE[path]
    text = command.help or ""
    assert re.match(r"[A-Z][^\n]*", text), path
    for param in command.params:
        if isinstance(param, click.Argument):
            named = re.findall(r"[A-Z]+", param.make_metavar(click.Context(command)))
            assert any(re.search(rf"\b{re.escape(name.rstrip('S'))}\b", text) for name in named or [""]), param.name


@everywhere
def test_short_helps_fit_into_the_lists_of_commands(path: str) -> None:
    ctx, command = TREE[path]
    if len(path.split()) == 2:
        assert len(COMMANDS[path.split()[1]][1]) <= LISTED + 5
    elif ctx.parent is not None:
        assert len(command.get_short_help_str(1000)) <= LISTED, path


def test_options_of_one_name_have_the_same_help_and_metavar() -> None:
    json = {str(param.help) for _, command in TREE.values() for param in options(command, "--json")}
    assert all(help.startswith("As JSON, for programs") for help in json), json
    for name, metavar in (("--runtime", None), ("--timeout", "SECONDS"), ("--uid", "UID")):
        found = {param.metavar for _, command in TREE.values() for param in options(command, name)}
        assert found == {metavar}, name


def options(command: click.Command, name: str) -> list[click.Option]:
    return [param for param in command.params if isinstance(param, click.Option) and name in param.opts]


@pytest.mark.parametrize(
    "path",
    [
        *("status", "doctor", "log", "explain", "key list", "key show", "request-key status", "config show"),
        *(
            "config check",
            "plugin list",
            "plugin show",
            "quota status",
            "quota watch",
            "ecryptfs inspect",
            "lab doctor",
        ),
    ],
)
def test_every_command_that_shows_something_has_json(path: str) -> None:
    assert options(TREE[f"upcall {path}"][1], "--json")


def test_pages_are_in_the_sections_where_man_expects_them() -> None:
    names = written(main).keys()
    assert {"man1/upcall.1", "man1/upcall-key-generate.1", "man8/upcall-broker.8", "man8/upcall-setup.8"} <= names
    assert {"man5/upcall-config.5", "man5/upcall-key.5", "man8/upcall-request-key.8"} <= names
    assert len(names) == len(pages(main)) == len(TREE) + len(files.pages())


def test_every_page_that_is_referred_to_exists() -> None:
    known = {f"{page.name}({page.section})" for page in pages(main)}
    for file, text in written(main).items():
        for name in re.findall(r"\bupcall[\w.-]*\(\d\)", plain(text)):
            assert name in known, f"{file}: {name}"


def called(line: str) -> str | None:
    """What is wrong with the call of upcall in a line of shell; None if there is none, or nothing."""
    found = re.search(r"(?:^|[\s/`])upcall ((?:[a-z][\w-]*|-[\w-]+|[^\s|`]+)(?: [^|`;&]*)?)", line)
    if found is None:
        return None
    words = found[1].partition(" -- ")[0].partition(" #")[0].split()
    command: click.Command = main
    for word in words:
        if not isinstance(command, click.Group) or word.startswith("-"):
            break
        inner = command.get_command(click.Context(command), word)
        if inner is None:
            return None if not word[0].islower() else f"there is no command {word}"
        command = inner
    known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)} | {"--help"}
    unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in known]
    return f"there is no {unknown[0]}" if unknown else None


def test_examples_call_existing_commands_and_options() -> None:
    for path, (_, command) in TREE.items():
        for line in take(command.help or "").examples.splitlines():
            assert line[:2] in ("$ ", "# ") and "upcall " in line, f"{path}: {line}"
            assert called(line) is None, f"{path}: {line}: {called(line)}"


DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("plugins/*/README.md")]


@pytest.mark.parametrize("document", [file for file in DOCUMENTS if file.name != "CHANGELOG.md"], ids=lambda f: f.stem)
def test_documents_call_existing_commands_and_options(document: Path) -> None:
    """Between backticks; labels of derived keys begin alike and are left out. Consoles: test_docs_examples.py."""
    text = document.read_text()
    spans = [span for span in re.findall(r"`([^`\n]+)`", text) if re.match(r"upcall (?!\w+ 1: )", span)]
    wrong = {line: why for line in spans if (why := called(line))}
    assert wrong == {}


def test_every_exit_code_that_an_error_has_is_explained() -> None:
    assert set(running._CODES.values()) <= about.EXITS.keys()


def test_every_environment_variable_that_is_read_is_documented() -> None:
    read = set()
    for file in ("keys/store.py", "process/paths.py", "config/__init__.py", "daemon/prompting/pinentry.py"):
        read |= set(re.findall(r'environ(?:ment)?\.get\("([A-Z_]+)"', (ROOT / "upcall" / file).read_text()))
    told = {name for names in about.ENVIRONMENT for name in names.split(", ")}
    assert read - {"TERM", "LANG", "LC_CTYPE"} <= told


# --- files ---------------------------------------------------------------------------------------------------------


def test_every_key_of_the_configuration_is_in_section_5() -> None:
    text = plain(written(main)["man5/upcall-config.5"])
    for table in TABLES:
        section = text.partition(f"\n.SH [{table.name.replace(ANY, 'NAME')}]\n")[2].partition("\n.SH ")[0]
        assert section, table.name
        for key in table.keys:
            name = "any" if key.name == ANY else key.name
            said = section.partition(f"\n.TP\n{name}\n")[2].partition("\n.TP\n")[0]
            assert key.about.split("`")[0].strip() in said, key.name
            assert key.kind.wanted in said
            assert (key.unset if key.default is None else as_toml(key.default)).replace("`", "") in said


def test_every_key_of_an_entry_is_in_section_5_and_in_the_document() -> None:
    assert files.ENTRY.keys() == keystore._TYPES.keys()
    text = (ROOT / "docs/keys.md").read_text()
    for name in files.ENTRY.keys() - {"description", "created"}:
        assert f"| `{name}` | {files.ENTRY[name]} |" in text


def test_the_forwarders_page_says_what_the_program_and_the_document_say() -> None:
    code = (ROOT / "upcall/protocols/request_key/forwarder/forward.c").read_text()
    usage = re.search(r'#define USAGE "usage: " NAME "([^"]+)\\n"', code)
    assert usage and f"upcall-request-key{usage[1]}" == files.FORWARDER_USAGE
    ends = re.search(r"enum \{ (ANSWERED[^}]+) \}; /\* as in sysexits", code)
    assert ends and [int(number) for number in re.findall(r"= (\d+)", ends[1])] == list(files.FORWARDER_EXITS)
    text = (ROOT / "docs/request-key.md").read_text()
    for number, said in files.FORWARDER_EXITS.items():
        assert f"| {number} | {said} |" in text
    for name, said in list(files.FORWARDER.items())[:-1]:
        assert f"| `{name}` | {said} |" in text


def test_the_forwarders_help_is_the_usage_of_its_page() -> None:
    program = ROOT / "upcall/protocols/request_key/forwarder/upcall-request-key"
    if not program.exists():
        pytest.skip("the forwarder is not compiled: there was no C compiler")
    told = subprocess.run([program, "--help"], capture_output=True, text=True, check=True).stdout
    assert told == f"usage: {files.FORWARDER_USAGE}\n"


# --- roff ----------------------------------------------------------------------------------------------------------

NASTY = [
    ".SH INJECTED",
    "'br",
    r"\fBbold",
    "a\n.br\nb",
    '"quoted" .TH',
    "tab\there",
    "é ✓ \u2028",
    r"\n(.z",
    ".",
    "-",
    "",
]


@pytest.mark.parametrize("text", NASTY)
def test_no_text_becomes_a_roff_request(text: str) -> None:
    made = words(text)
    assert "\n" not in made and made.isascii()
    assert not made.startswith((".", "'"))
    assert not re.search(r"\\(?![-e&]|\(|\[u|f[BR])", made)


@pytest.mark.skipif(shutil.which("mandoc") is None, reason="mandoc is not installed (Debian: mandoc)")
def test_mandoc_shows_nasty_text_unchanged() -> None:
    texts = [text for text in NASTY if text.strip() and "\n" not in text and "\u2028" not in text and "\t" not in text]
    items = Items(tuple(((bold(text),), text) for text in texts))
    page = Page("nasty", 1, texts[0], (("NASTY", (Paragraph(texts[0]), items, Verbatim("\n".join(texts)))),))
    done = subprocess.run(["mandoc", "-Tutf8"], input=render(page, "1").encode(), capture_output=True, check=True)
    shown = re.sub(r".\x08", "", done.stdout.decode())
    for text in texts:
        assert shown.count(text) >= 3, text


def test_pages_are_the_same_every_time_and_dated_by_packagers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    before = written(main)
    assert before == written(main)
    assert '.TH UPCALL 1 "" ' in before["man1/upcall.1"]
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1760000000")
    assert written(main) == before  # what `upcall setup` compares with
    assert '.TH UPCALL 1 "2025-10-09" ' in CliRunner().invoke(main, ["manual"]).output
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "nonsense")
    assert CliRunner().invoke(main, ["manual"]).output == before["man1/upcall.1"]


CHECKERS = {
    "mandoc": ["mandoc", "-Tlint", "-Wwarning"],
    "groff": ["groff", "-ww", "-man", "-Tutf8", "-z"],
}


@pytest.mark.parametrize("checker", CHECKERS)
def test_the_checkers_accept_every_page_without_a_warning(
    checker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which(checker) is None:
        pytest.skip(f"{checker} is not installed (Debian: {checker})")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1760000000")  # mandoc wants a date
    assert CliRunner().invoke(main, ["manual", "--output", str(tmp_path)]).exit_code == 0
    made = sorted(str(path) for path in tmp_path.rglob("*.[158]"))
    assert len(made) == len(pages(main))
    done = subprocess.run([*CHECKERS[checker], *made], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("", "")


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "title"),
    [
        ([], ".TH UPCALL 1"),
        (["key", "generate"], r".TH UPCALL\-KEY\-GENERATE 1"),
        (["upcall-config.5"], r".TH UPCALL\-CONFIG 5"),
        (["config"], r".TH UPCALL\-CONFIG 1"),
        (["request-key.8"], r".TH UPCALL\-REQUEST\-KEY 8"),
    ],
)
def test_a_page_is_found_by_its_words_and_by_its_name(arguments: list[str], title: str) -> None:
    done = CliRunner().invoke(main, ["manual", *arguments])
    assert done.exit_code == 0 and done.output.startswith(title + " ")


def test_an_unknown_page_is_a_usage_error_with_a_suggestion() -> None:
    done = CliRunner().invoke(main, ["manual", "kye"])
    assert done.exit_code == os.EX_USAGE and "did you mean 'key'?" in done.output


def test_manual_list_shows_every_page_with_its_summary() -> None:
    listed = CliRunner().invoke(main, ["manual", "--list"]).output.splitlines()
    assert (
        len(listed) == len(pages(main))
        and "upcall-setup(8) - install upcall's services on this machine, or remove them" in listed
    )


def test_the_version_in_a_page_is_the_packages() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f'"upcall {version}"' in written(main)["man1/upcall.1"]

"""Reads the code blocks of the documentation, and checks calls of upcall in them without running them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import click

from upcall.cli import main

ROOT = Path(__file__).parents[1]
PAGES: Sequence[Path] = (
    ROOT / "README.md",
    ROOT / "SECURITY.md",
    *sorted(ROOT.glob("docs/*.md")),
    ROOT / "bench" / "README.md",
    *sorted(ROOT.glob("plugins/*/README.md")),
)
_FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A fenced block of a page: the language after the fence, its text, the number of its first line."""

    page: str
    language: str
    text: str
    line: int

    @property
    def first(self) -> str:
        """The first line with anything in it: names the block in lists."""
        return next((line for line in self.text.splitlines() if line.strip()), "")

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


class Command(NamedTuple):
    """A command of a console: whether root types it, its text, the output that the page shows."""

    root: bool
    text: str
    output: Sequence[str]


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text("utf-8")
    for found in _FENCE.finditer(text):
        line = text.count("\n", 0, found.start()) + 2
        yield Block(page.relative_to(ROOT).as_posix(), found[1], found[2], line)


def without_blocks(page: Path) -> str:
    """The page's text outside of fenced blocks."""
    return _FENCE.sub("", page.read_text("utf-8"))


def commands(block: Block) -> list[Command]:
    """The commands of a console: lines that begin with `$ ` or `# `, and what follows them. ValueError if output comes
    first."""
    found: list[tuple[bool, list[str], list[str]]] = []
    continued = False
    for line in block.text.splitlines():
        if continued:
            found[-1][1].append(line)
        elif line[:2] in ("$ ", "# "):
            found.append((line[0] == "#", [line[2:]], []))
        elif found:
            found[-1][2].append(line)
        elif line.strip():
            raise ValueError(f"{block}: output before the first command: {line!r}")
        continued = line.endswith("\\") and (continued or line[:2] in ("$ ", "# "))
    return [Command(root, "\n".join(text), output) for root, text, output in found]


def walk(name: str, page: Path = ROOT / "README.md") -> list[Command]:
    """The commands of the page's consoles with `<!-- walk: NAME -->` above them."""
    text = page.read_text("utf-8")
    marked = re.finditer(rf"^<!-- walk: {re.escape(name)} -->\n```console\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    found = [Block(page.name, "console", one[1], text.count("\n", 0, one.start(1)) + 1) for one in marked]
    return [command for block in found for command in commands(block)]


def normal(line: str) -> str:
    """The line without what differs from run to run."""
    line = re.sub(r"\b[0-9a-f]{16}\b", "SIGNATURE", line)
    line = re.sub(r"/(?:home/\w+|tmp/upcall-docs-\w+/home)\b", "HOME", line)
    line = re.sub(r"\d+(?:[.,]\d+)*", "N", line)
    return re.sub(r"[\s─━═]+", " ", line).strip()


def shown(command: Command, output: list[str]) -> str | None:
    """The first line that the page shows and that did not come; None if all came in order."""
    rest = iter(normal(line) for line in output)
    for line in command.output:
        if line.strip() and line.strip() != "..." and normal(line) not in rest:
            return line
    return None


def words_of(text: str) -> Iterator[list[str]]:
    """The simple commands of a line of shell, as words without redirections. ValueError if a quote is not closed."""
    lexer = shlex.shlex(text.replace("\\\n", " "), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    lexer.commenters = ""
    words: list[str] = []
    skip = False
    for word in lexer:
        if skip:
            skip = False
        elif word.startswith("#") and not word.startswith("#!"):
            break
        elif word and set(word) <= set("();<>|&"):
            if word[0] in "<>":
                skip = True
                if words and words[-1].isdigit():
                    words.pop()
                continue
            if words:
                yield words
            words = []
        else:
            words.append(word)
    if words:
        yield words


def wrong_call(text: str) -> str | None:
    """What is wrong with the calls of upcall in a line of shell, by click's own parser; None if nothing is."""
    for words in words_of(text):
        while words and re.fullmatch(r"[A-Za-z_]\w*=.*", words[0]):
            words = words[1:]
        if words and Path(words[0]).name == "sudo":
            words = words[1:]
        if words and Path(words[0]).name == "upcall" and (wrong := _parsed(words[1:])):
            return wrong
    return None


def _parsed(words: list[str]) -> str | None:
    command: click.Command = main
    context = click.Context(main, info_name="upcall")
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        inner = command.get_command(context, words[0])
        if inner is None:
            return f"there is no command {words[0]!r}"
        command, words = inner, words[1:]
        context = click.Context(command, info_name=command.name, parent=context)
    if isinstance(command, click.Group) or "--help" in words:
        return None
    try:
        command.parse_args(context, list(words))
    except click.BadParameter as error:
        # Files of the example need not be there.
        return None if "does not exist" in error.message else error.format_message()
    except click.UsageError as error:
        return error.format_message()
    return None

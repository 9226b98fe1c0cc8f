"""Generates a page for each command from its `--help`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import click

from upcall.install.manual.about import ENVIRONMENT, EXAMPLES, EXITS, FILES, SEE
from upcall.install.manual.roff import Block, Items, Page, Paragraph, Verbatim, bold, italic

PROGRAM: Final = "upcall"
# Commands for root or services: section 8. All others are in section 1, as those of git and systemd are.
ADMINISTRATION: Final = frozenset({"broker", "setup", "session"})

_EXAMPLES: Final = "Examples:"
_CODES: Final = "Exit codes:"
_CODE: Final = re.compile(r"(?:^|; )(\d+)(?: |(?=;|$))")
_OPTION: Final = re.compile(r"(?<![\w-])(--?[A-Za-z][\w-]*)")


class HelpText(NamedTuple):
    """The parts of a help text."""

    paragraphs: tuple[Block, ...]
    codes: tuple[tuple[str, str], ...]  # (exit code, meaning)
    examples: str


def pages(main: click.Group) -> Iterator[Page]:
    """Yields the pages of the program and of every command."""
    ctx = click.Context(main, info_name=PROGRAM, **main.context_settings)
    yield _program(ctx, main)
    yield from _below(ctx, main)


def _below(ctx: click.Context, group: click.Group) -> Iterator[Page]:
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        if command is None or command.hidden:
            continue
        inner = click.Context(command, info_name=name, parent=ctx)
        yield page(inner, command)
        if isinstance(command, click.Group):
            yield from _below(inner, command)


def page(ctx: click.Context, command: click.Command) -> Page:
    """Returns the page of a command."""
    said = take(command.help or "")
    group = isinstance(command, click.Group)
    body: list[tuple[str, tuple[Block, ...]]] = [
        ("SYNOPSIS", (_synopsis(ctx, command),)),
        ("DESCRIPTION", said.paragraphs),
    ]
    if isinstance(command, click.Group):
        body.append(("COMMANDS", (_commands(ctx, command),)))
    body.append(("OPTIONS", (_options(ctx, command),)))
    if not group or said.codes:
        body.append(("EXIT STATUS", _exits(said.codes)))
    word = _words(ctx)[1]
    body += [(name, (_named(terms),)) for name, terms in _extra(word)]
    if said.examples:
        body.append(("EXAMPLES", (Verbatim(said.examples),)))
    body.append(("SEE ALSO", (Paragraph(", ".join(_see(ctx, command, word))),)))
    return Page(page_name(ctx), section(ctx), brief(ctx, command), tuple(body))


def _program(ctx: click.Context, main: click.Group) -> Page:
    said = take(main.help or "")
    codes = tuple((str(code), text) for code, text in EXITS.items())
    body: list[tuple[str, tuple[Block, ...]]] = [
        ("SYNOPSIS", (_synopsis(ctx, main),)),
        ("DESCRIPTION", said.paragraphs),
        ("COMMANDS", (_commands(ctx, main),)),
        ("OPTIONS", (_options(ctx, main),)),
        ("EXIT STATUS", (Paragraph("As in sysexits.h, unless a command's own page says otherwise."), _coded(codes))),
        ("ENVIRONMENT", (_named(ENVIRONMENT),)),
        ("FILES", (_named(FILES[""]),)),
        ("EXAMPLES", (Verbatim(EXAMPLES),)),
        ("SEE ALSO", (Paragraph(", ".join(SEE[""])),)),
    ]
    return Page(PROGRAM, 1, brief(ctx, main), tuple(body))


# --- names -------------------------------------------------------------------------------------------------------


def _words(ctx: click.Context) -> list[str]:
    return ctx.command_path.split()


def page_name(ctx: click.Context) -> str:
    """Returns the page's name: the command's words, joined by "-"."""
    return "-".join(_words(ctx))


def section(ctx: click.Context) -> int:
    """Returns the manual's section: 8 for administration, otherwise 1."""
    words = _words(ctx)
    return 8 if len(words) > 1 and words[1] in ADMINISTRATION else 1


def brief(ctx: click.Context, command: click.Command) -> str:
    """Returns the line for NAME: without a capital and a full stop."""
    text = short(command).rstrip(".")
    return text[:1].lower() + text[1:]


def short(command: click.Command) -> str:
    """Returns the command's line in a list of commands."""
    return command.get_short_help_str(limit=1000)


# --- help texts --------------------------------------------------------------------------------------------------


def take(text: str) -> HelpText:
    """Parses a help text as click does: a paragraph that begins with a line of backspace keeps its lines."""
    paragraphs: list[Block] = []
    codes: list[tuple[str, str]] = []
    examples = ""
    for part in re.split(r"\n\s*\n", _clean(text)):
        kept = part.startswith("\b")
        lines = part.removeprefix("\b").strip("\n")
        if lines.startswith(_EXAMPLES):
            examples = "\n".join(line.strip() for line in lines.removeprefix(_EXAMPLES).strip("\n").splitlines())
            continue
        before, found, after = lines.partition(_CODES)
        if before.strip():
            paragraphs.append(Verbatim(before.rstrip()) if kept else Paragraph(_marked(before)))
        if found:
            codes += _taken(after)
    return HelpText(tuple(paragraphs), tuple(codes), examples)


def _clean(text: str) -> str:
    from inspect import cleandoc

    return cleandoc(text.partition("\f")[0])


def _marked(text: str) -> str:
    """Marks options within a sentence as code."""
    parts = text.split("`")
    return "`".join(part if at % 2 else _OPTION.sub(r"`\1`", part) for at, part in enumerate(parts))


def _taken(text: str) -> list[tuple[str, str]]:
    parts = _CODE.split(" ".join(text.split()).rstrip("."))
    return [(code, said.strip()) for code, said in zip(parts[1::2], parts[2::2], strict=True)]


# --- blocks ------------------------------------------------------------------------------------------------------


def _synopsis(ctx: click.Context, command: click.Command) -> Paragraph:
    return Paragraph(f"`{ctx.command_path}` {' '.join(command.collect_usage_pieces(ctx))}")


def _commands(ctx: click.Context, group: click.Group) -> Items:
    items = []
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        if command is not None and not command.hidden:
            inner = click.Context(command, info_name=name, parent=ctx)
            items.append(((bold(page_name(inner)), f"({section(inner)})"), short(command)))
    return Items(tuple(items))


def _options(ctx: click.Context, command: click.Command) -> Items:
    options = [one for one in command.get_params(ctx) if isinstance(one, click.Option)]
    records = [one.get_help_record(ctx) for one in options]
    return Items(tuple((tuple(_term(record[0])), _marked(record[1])) for record in records if record is not None))


def _term(text: str) -> Iterator[str]:
    """Yields the parts of `-q, --quiet`, `--uid UID`, `--user / --system`: literals in bold, placeholders in
    italics."""
    for part in re.split(r"( / |, |\s+)", text):
        if part.startswith("-"):
            yield bold(part)
        else:
            yield part if part in (" / ", ", ") or not part.strip() else italic(part)


def _exits(codes: Sequence[tuple[str, str]]) -> tuple[Block, ...]:
    rest = Paragraph("0 if all went well; what else there is stands in `upcall`(1).")
    return (_coded(codes), Paragraph("Others stand in `upcall`(1).")) if codes else (rest,)


def _coded(codes: Sequence[tuple[str, str]]) -> Items:
    return Items(tuple(((bold(code),), _marked(text) or "It went well.") for code, text in codes))


def _named(terms: dict[str, str]) -> Items:
    return Items(tuple(((bold(name),), text) for name, text in terms.items()))


def _extra(word: str) -> Iterator[tuple[str, dict[str, str]]]:
    if word in FILES:
        yield "FILES", FILES[word]


def _see(ctx: click.Context, command: click.Command, word: str) -> Iterator[str]:
    parent = ctx.parent
    if parent is not None:
        yield f"`{page_name(parent)}`({section(parent)})"
        group = parent.command
        if parent.parent is not None and isinstance(group, click.Group):
            others = [name for name in group.list_commands(parent) if name != command.name]
            yield from (f"`{page_name(parent)}-{name}`({section(ctx)})" for name in others)
    yield from SEE.get(word, ())

"""`upcall manual`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import click

from upcall.cli import main
from upcall.cli.completing import manual_pages
from upcall.core.errors import UsageError
from upcall.core.suggestion import did_you_mean
from upcall.install.manual.written import packagers_date, pages, written
from upcall.process import start_python as startpython


@click.command("manual")
@click.argument("words", nargs=-1, metavar="[PAGE]...", shell_complete=manual_pages)
@click.option("--list", "listing", is_flag=True, help="List the pages.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write every page below this folder, in man1, man5 and man8.",
)
def command(words: tuple[str, ...], listing: bool, output: Path | None) -> None:
    """Show a manual page, or write all of them, for packagers.

    PAGE is a command's words, such as `key generate`, or a page's name, such as `upcall-config.5`; without it, the
    page of upcall itself is shown: in a terminal by man, otherwise as source. The pages are made of this version's
    help texts; SOURCE_DATE_EPOCH sets their date. `upcall setup` installs them where man finds them.

    \b
    Examples:
      $ upcall manual key generate
      $ upcall manual upcall-config.5
      $ upcall manual --output debian/tmp/usr/share/man
    """
    if output is not None:
        for file, text in written(main, packagers_date()).items():
            path = output / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "ascii")
        return
    if listing:
        for page in sorted(pages(main), key=lambda one: (one.name, one.section)):
            click.echo(f"{page.name}({page.section}) - {page.brief}")
        return
    _show(written(main, packagers_date())[_file("-".join(words) or "upcall")])


def _file(asked: str) -> str:
    """Returns the file name of a page. A command's page takes precedence over a file's."""
    known: dict[str, str] = {}
    for page in sorted(pages(main), key=lambda one: one.section):
        names = (page.name, page.name.removeprefix("upcall-"))
        for name in (*names, *(f"{name}.{page.section}" for name in names)):
            known.setdefault(name, page.file)
    if asked not in known:
        raise UsageError(
            f"there is no page '{asked}'{did_you_mean(asked, known) or ': `upcall manual --list` lists them'}"
        )
    return known[asked]


def _show(text: str) -> None:
    environment = startpython.cleaned()
    program = shutil.which("man", path=environment.get("PATH"))
    if not sys.stdout.isatty() or program is None:
        click.echo(text, nl=False)
        return
    subprocess.run([program, "-l", "-"], input=text.encode("ascii"), env=environment, check=False)

"""All pages as text, by the files that they are in."""

from __future__ import annotations

import datetime
import functools
import os
from importlib.metadata import version
from typing import Final

from upcall.cli import main
from upcall.manual import commands, files
from upcall.manual.roff import Page, render

_EPOCH: Final = "SOURCE_DATE_EPOCH"  # https://reproducible-builds.org/specs/source-date-epoch/


@functools.cache
def pages() -> tuple[Page, ...]:
    """Imports every command: that takes a moment."""
    return (*commands.pages(main), *files.pages())


def written() -> dict[str, str]:
    """`man1/upcall.1` and so on -> what is in it. The same on every day, unless a packager gives a date."""
    epoch = os.environ.get(_EPOCH, "")
    date = f"{datetime.datetime.fromtimestamp(int(epoch), datetime.UTC):%Y-%m-%d}" if epoch.isdecimal() else ""
    return {page.file: render(page, version("upcall"), date) for page in pages()}

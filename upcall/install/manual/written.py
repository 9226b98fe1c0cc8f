"""Returns all pages as text, by file name."""

from __future__ import annotations

import datetime
import functools
import os
from importlib.metadata import version
from typing import Final

import click

from upcall.install.manual import commands, files
from upcall.install.manual.roff import Page, render

_EPOCH: Final = "SOURCE_DATE_EPOCH"  # https://reproducible-builds.org/specs/source-date-epoch/


@functools.cache
def pages(main: click.Group) -> tuple[Page, ...]:
    """Of the program and of its files. Imports every command: that takes a moment."""
    return (*commands.pages(main), *files.pages())


def packagers_date() -> str:
    """As pages show it; "" if there is none."""
    epoch = os.environ.get(_EPOCH, "")
    return f"{datetime.datetime.fromtimestamp(int(epoch), datetime.UTC):%Y-%m-%d}" if epoch.isdecimal() else ""


def written(main: click.Group, date: str = "") -> dict[str, str]:
    """`man1/upcall.1` and so on -> what is in it; without a date the same on every day."""
    ours = version("upcall")
    return {page.file: render(page, ours, date) for page in pages(main)}

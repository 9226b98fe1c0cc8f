"""Renders all pages."""

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
    """Returns the pages of all commands and files. Imports every command, which takes a moment."""
    return (*commands.pages(main), *files.pages())


def packagers_date() -> str:
    """Returns the date from SOURCE_DATE_EPOCH for display; "" if it is not set."""
    epoch = os.environ.get(_EPOCH, "")
    return f"{datetime.datetime.fromtimestamp(int(epoch), datetime.UTC):%Y-%m-%d}" if epoch.isdecimal() else ""


def written(main: click.Group, date: str = "") -> dict[str, str]:
    """Returns the source of each page by its path, such as `man1/upcall.1`. Without a date it is reproducible."""
    ours = version("upcall")
    return {page.file: render(page, ours, date) for page in pages(main)}

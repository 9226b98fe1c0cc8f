"""Starts a process of ours from its command line: settings, trust in its files, errors and exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from upcall.config import ConfigError
from upcall.core.errors import UpcallError, UsageError, error_words
from upcall.process import trust
from upcall.process.settings import of_arguments
from upcall.process.trust import Fault

T = TypeVar("T", bound=tuple[Any, ...])


def run(name: str, kind: type[T], arguments: Sequence[str], serve: Callable[[T, Sequence[Fault]], int | None]) -> int:
    """Calls `serve(settings, faults)`: settings of this `kind` (upcall/process/settings.py) from `arguments`, and the
    files that others could change, where that is no reason to refuse.

    Returns the exit status: that of `serve` (None: 0), or, with the error on stderr after `name`, EX_USAGE if the
    settings are wrong, EX_CONFIG for a ConfigError, EX_UNAVAILABLE for other errors."""
    try:
        settings = of_arguments(kind, arguments)
    except UsageError as error:
        return _failed(name, error, os.EX_USAGE)
    try:
        return serve(settings, trust.require()) or os.EX_OK
    except ConfigError as error:
        return _failed(name, error, os.EX_CONFIG)
    except (UpcallError, OSError) as error:
        return _failed(name, error, os.EX_UNAVAILABLE)


def _failed(name: str, error: Exception, status: int) -> int:
    print(f"{name}: {error_words(error)}", file=sys.stderr)  # noqa: T201
    return status

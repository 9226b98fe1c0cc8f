"""Defines the lab's errors, with their exit codes."""

from __future__ import annotations

import os


class LabError(Exception):
    """Base class of the lab's errors. `exit_code`: as in sysexits.h."""

    exit_code = os.EX_SOFTWARE


class LabUnavailable(LabError):
    """A requirement of the lab is missing on this machine. The text names it and the remedy."""

    exit_code = os.EX_UNAVAILABLE


class LabTimedOut(LabError):
    """The command did not end within the time limit. The machine was stopped."""

    exit_code = os.EX_TEMPFAIL


class MachineDied(LabError):
    """The machine ended before the command: it did not boot, or its kernel panicked."""

    exit_code = os.EX_OSERR

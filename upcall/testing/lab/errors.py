"""Defines the lab's errors, with their exit codes."""

from __future__ import annotations

import os


class LabError(Exception):
    """The lab could not do what was asked. `exit_code` is one of sysexits' codes."""

    exit_code = os.EX_SOFTWARE


class LabUnavailable(LabError):
    """Something the lab needs is missing on this machine; the message names it and the remedy."""

    exit_code = os.EX_UNAVAILABLE


class LabTimedOut(LabError):
    """The time limit passed before the command ended; the machine was stopped."""

    exit_code = os.EX_TEMPFAIL


class MachineDied(LabError):
    """The machine ended before the command did: it did not boot, or its kernel panicked."""

    exit_code = os.EX_OSERR

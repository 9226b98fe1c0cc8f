"""Defines the checks of the contract of key modules. `CHECKS` lists them in the order in which to run them.

Each is a function whose name reads as a sentence. It takes a `Subject` and raises ContractBroken, or NotApplicable."""

from __future__ import annotations

from upcall.testing.checks import enrolment, life, opening, verbs
from upcall.testing.subject import Check

CHECKS: tuple[Check, ...] = (*enrolment.CHECKS, *verbs.CHECKS, *opening.CHECKS, *life.CHECKS)

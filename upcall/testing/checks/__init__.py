"""The contract of key modules, check by check. Each has a name that reads as a sentence, takes a `Subject`, and raises
ContractBroken, or NotApplicable. `CHECKS` has them in the order in which they are best made."""

from __future__ import annotations

from upcall.testing.checks import enrolment, life, opening, verbs
from upcall.testing.subject import Check

CHECKS: tuple[Check, ...] = (*enrolment.CHECKS, *verbs.CHECKS, *opening.CHECKS, *life.CHECKS)

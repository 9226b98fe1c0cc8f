"""Finds faults of this installation and their remedies. docs/observing.md lists the checks.

`table.CHECKS` names every check; a check is a function that takes a `Scene` and yields findings.
"""

"""What is wrong with this installation, and what to do about it. docs/observing.md lists what is looked at.

`table.CHECKS` names every check; a check is a function that is given a `Scene` and yields findings.
"""

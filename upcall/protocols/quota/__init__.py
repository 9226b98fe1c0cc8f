"""Receives the kernel's quota warnings (VFS_DQUOT) and notifies people, in a source with a process of its own.

`source` reads the warnings in the process's loop, coalesces equal ones first (`coalescing`), and has the broker
deliver notices. `worker`, a thread, reads usage and limits, keeps the state and makes notices. `policy`, `rate_limit`
and `backlog` decide who is notified of what and when; they do no I/O.
"""

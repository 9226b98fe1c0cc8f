"""Quotas: the kernel warns (VFS_DQUOT), people are told. A source in a process of its own.

`source` reads the kernel's warnings in the process's loop, folds equal ones before anything else is done with them
(`coalescing`), and has the broker deliver notices. `worker`, a thread, asks for the figures, keeps the state and makes
notices; what it tells whom and when is decided in `policy`, `rate_limit` and `backlog`, which know no descriptor.
"""

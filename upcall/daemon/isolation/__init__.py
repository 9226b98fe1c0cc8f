"""Runs key modules in processes of their own, behind the same interface.

    KeyHandler -- IsolatedModule -- Child ===== socketpair ===== serving -- the module
                  module.py         child.py                     serving.py

A fault of a foreign library (abort, hang, leak, memory corruption) affects only the process of this module. Pending
requests of that process are refused, and the next request starts another process. Secrets cross the socketpair only
when the module requests them, for the request that it handles.

Terms. A *Child* is a process, the daemon's end of its socketpair, and the pending calls. There is no reader thread:
one of the waiting callers reads for all, which saves a hand-over on each round trip. A thread per child starts the
process and waits for its end, because PR_SET_PDEATHSIG refers to the thread that forked.

End of a child. A child ends by its own fault; when a call is overdue by `GRACE`; after a malformed message; with the
daemon; and with its last key, so that no key material stays in memory.

Why not multiprocessing: it forks a process with threads, or starts a helper process for each child; it unpickles
messages, which lets the child run code in the daemon; and the child inherits all descriptors.
"""

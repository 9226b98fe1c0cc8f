"""Runs key modules in processes of their own, behind the same interface.

    KeyHandler -- IsolatedModule -- Child ===== socketpair ===== serving -- the module
                  module.py         child.py                     serving.py

What foreign libraries do to a process (abort, hang, leak, scribble) they do to one that serves this module only: the
requests that were in its hands are refused, and the next one starts another. Secrets cross the socketpair only when
the module asks for them, in the name of the request that it is at work for.

Who is who. A *Child* is a process, the daemon's end of its socketpair, and the calls that are under way. There is no
thread that reads: of the callers that wait, one reads for all, which saves a hand-over on each round trip. A thread
of its own starts the process and waits for its end, because PR_SET_PDEATHSIG means the thread that forked.

What ends a child. Its own death; a call that is overdue by `GRACE`; nonsense on the socketpair; the daemon's end; and
the closing of its last key, so that nothing of it stays in memory.

Why not multiprocessing: it forks a process that has threads, or starts a helper for each of its own; it unpickles what
the child says, which is to run its code; and it inherits whatever descriptors there are.
"""

"""The broker: who is asked, what is owed, when to give up; and the process that runs it.

`core` decides and knows no descriptor; `server` is the process, with `devices` towards the kernel, `requesters`
towards processes, and `loop` to wait on all of them.
"""

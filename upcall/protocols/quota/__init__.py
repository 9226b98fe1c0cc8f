"""The broker's quota conversation: the kernel warns, people are told.

`source` reads the kernel's warnings in the broker's loop and folds equal ones before anything else is done with them
(`folding`). `clerk`, a thread, asks for the figures, keeps the state and makes notices; what it tells whom and when
is decided in `core`, `digest` and `kept`, which know no descriptor. Notices go back to the loop, which delivers them.
"""

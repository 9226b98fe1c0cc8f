"""Runs the broker's process: `server` with its loop, router and sources; `registration`, `daemon_link`, `launcher`.

Routing and deadlines, without I/O: upcall/core. Sources: upcall/protocols.
"""

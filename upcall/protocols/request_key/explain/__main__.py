"""Runs a handler's `explain` in a process of its own."""

from upcall.protocols.request_key.explain.child import run

if __name__ == "__main__":
    run()

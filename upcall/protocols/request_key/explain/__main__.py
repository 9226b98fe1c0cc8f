"""The process in which a handler explains itself."""

from upcall.protocols.request_key.explain.child import run

if __name__ == "__main__":
    run()

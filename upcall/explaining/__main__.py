"""The process in which a handler explains itself."""

from upcall.explaining.child import run

if __name__ == "__main__":
    run()

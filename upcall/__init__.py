"""upcall: a kernel-userspace upcall message broker, shaped like eCryptfs's public-key messaging."""

__version__ = "0.1.0"

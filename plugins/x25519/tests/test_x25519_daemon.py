"""A real broker and a real daemon with keys of x25519, asked over real sockets."""

from __future__ import annotations

from upcall_x25519 import module

from upcall.testing.daemon_contract import KeyDaemonContract


class TestX25519InADaemon(KeyDaemonContract):
    module = module

"""A real broker and a real daemon with keys of openssl, asked over real sockets."""

from __future__ import annotations

from upcall_rsa import module

from upcall.testing.daemon_contract import KeyDaemonContract


class TestOpensslInADaemon(KeyDaemonContract):
    module = module
    values = {"bits": "2048"}

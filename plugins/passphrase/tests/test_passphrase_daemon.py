"""A real broker and a real daemon with keys of passphrase, asked over real sockets."""

from __future__ import annotations

from upcall_passphrase import module

from upcall.testing.daemon_contract import KeyDaemonContract


class TestPassphraseInADaemon(KeyDaemonContract):
    module = module
    values = {"memory": "64", "passes": "1"}

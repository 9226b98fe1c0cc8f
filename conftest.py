"""Which tests are slow: those of the files named here, and of the plugins that need a token or a TPM."""

from __future__ import annotations

import sys

import pytest

sys._xoptions["upcall-environment"] = (
    True  # plugins of tests are in PYTHONPATH, root's, too; see upcall/process/start_python.py
)

SLOW = (
    "tests/attacks/",
    "tests/test_bench",
    "tests/test_cli_plugin.py",
    "tests/test_doctor_broken.py",
    "tests/test_explain.py",
    "tests/test_forwarder_",
    "tests/test_isolation",
    "tests/test_keyringbackend.py",
    "tests/test_keyring_trap.py",
    "tests/test_link_model.py",
    "tests/test_locking.py",
    "tests/test_logind.py",
    "tests/test_prompting",
    "tests/test_quota_flood.py",
    "tests/test_quota_process.py",
    "tests/test_reload_",
    "tests/test_sessions.py",
    "tests/test_setup.py",
    "tests/test_testing_checks.py",
    "tests/test_testing_contract.py",
    "plugins/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(SLOW):
            item.add_marker(pytest.mark.slow)
        if item.nodeid.startswith("tests/attacks/"):
            item.add_marker(pytest.mark.attack)
            item.add_marker(pytest.mark.slow)

"""Which tests are slow: those of the files named here, and of the plugins that need a token or a TPM."""

from __future__ import annotations

import os
import sys

import pytest

from tests.cited import CITED, unshown

sys._xoptions["upcall-environment"] = (
    True  # plugins of tests are in PYTHONPATH, root's, too; see upcall/process/start_python.py
)

SLOW = (
    "tests/attacks/",
    "tests/test_bench",
    "tests/test_broker_forged.py",
    "tests/test_broker_quota.py",
    "tests/test_broker_requesters.py",
    "tests/test_cli_",
    "tests/test_completion.py",
    "tests/test_doctor_",
    "tests/test_explain.py",
    "tests/test_fairness.py",
    "tests/test_forwarder_",
    "tests/test_fuzz.py",
    "tests/test_hardening.py",
    "tests/test_isolation",
    "tests/test_keyring",
    "tests/test_link_model.py",
    "tests/test_locking.py",
    "tests/test_logind.py",
    "tests/test_manual.py",
    "tests/test_prompting",
    "tests/test_quota_flood.py",
    "tests/test_quota_process.py",
    "tests/test_release.py",
    "tests/test_reload_",
    "tests/test_sessions.py",
    "tests/test_setup.py",
    "tests/test_startpython.py",
    "tests/test_testing_checks.py",
    "tests/test_testing_contract.py",
    "tests/test_trust.py",
    "tests/test_wire_requestkeyconf.py",
    "plugins/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(SLOW):
            item.add_marker(pytest.mark.slow)
        if item.nodeid.startswith("tests/attacks/"):
            item.add_marker(pytest.mark.attack)
            item.add_marker(pytest.mark.slow)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cited", action="append", default=[], choices=("tests", "tests/attacks", "plugins"),
        help="fail if a test there that SECURITY.md names did not pass; may be repeated",
    )  # fmt: skip


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    folders = config.getoption("--cited")
    if folders and not hasattr(config, "workerinput"):  # pytest-xdist's workers see only a part
        config.pluginmanager.register(_Cited(tuple(folders)))


def _part_of(file: str) -> str:
    return next(part for part in ("tests/kernel", "tests/attacks", "tests", "plugins") if file.startswith(f"{part}/"))


class _Cited:
    """Notes what has passed."""

    def __init__(self, folders: tuple[str, ...]) -> None:
        self._folders = folders
        self._passed: set[str] = set()
        self._missing: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self._passed.add(report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        files = {file for file, _ in CITED if _part_of(file) in self._folders}
        self._missing = unshown(files, self._passed)
        root = os.geteuid() == 0  # many need to be other users
        if self._missing and root and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for test in self._missing:
            terminalreporter.write_line(f"SECURITY.md names it, and it did not pass: {test}", red=True)

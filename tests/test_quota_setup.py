"""The table [quota] of the configuration, and that only root serves quotas."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from upcall import config
from upcall.config import ConfigError
from upcall.core.errors import UsageError
from upcall.process.paths import SYSTEM_FOLDER, Place
from upcall.protocols.quota import setup
from upcall.protocols.quota.settings import Rules


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = tmp_path / "config.toml"
    monkeypatch.setattr(config, "SYSTEM", found)
    return found


def test_without_a_file_the_defaults_hold(file: Path) -> None:
    assert setup.rules() == Rules()


def test_every_rule_can_be_set(file: Path) -> None:
    file.write_text(
        "[quota]\nthresholds = [95, 50, 95]\nhysteresis = 2\ninterval = 60\nnear-interval = 5.5\nsettle = 0\n"
        "remind = 86400\ndigest-after = 3\ndigest-within = 60\ncopy-to-system = true\n"
    )
    assert setup.rules() == Rules((50, 95), 2, 60, 5.5, 0, 86400, 3, 60, True)


def test_an_empty_list_of_thresholds_turns_early_warnings_off(file: Path) -> None:
    file.write_text("[quota]\nthresholds = []\n")
    assert setup.rules().thresholds == ()


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("thresholds = [80, 101]", "quota.thresholds: must be a whole number from 1 to 100"),
        ("thresholds = 80", "quota.thresholds: must be a list"),
        ("interval = 0", "quota.interval: must be a number from 1"),
        ('interval = "often"', "quota.interval: must be a number"),
        ("interval = true", "quota.interval: must be a number"),
        ("interval = nan", "quota.interval: must be a number"),
        ("digest-after = 0", "quota.digest-after: must be a whole number from 1"),
        ("digest-after = 1.5", "quota.digest-after: must be a whole number"),
        ("copy-to-system = 1", "quota.copy-to-system: must be true or false"),
        ("copy_to_system = true", "quota.copy_to_system: unknown"),
    ],
)
def test_a_bad_setting_is_refused_by_its_name(file: Path, line: str, why: str) -> None:
    file.write_text(f"[quota]\n{line}\n")
    with pytest.raises(ConfigError, match=why):
        setup.rules()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may")
def test_a_quota_source_that_is_not_roots_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="root's source"):
        setup.configured(Place(tmp_path))


def test_the_state_is_in_var_lib_or_in_the_folder_of_a_private_broker(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert setup.configured(Place(SYSTEM_FOLDER)).state == Path("/var/lib/upcall/quota.json")
    assert setup.configured(Place(Path("/x"))).state == Path("/x/quota.json")

"""The contract's checks, on modules that are broken in one way each: only the check that is meant for it says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import broken
from upcall.testing.checks import CHECKS
from upcall.testing.contract import KeyModuleContract
from upcall.testing.subject import (
    Check,
    ContractBroken,
    Made,
    NotApplicable,
    Subject,
    make_key,
    run_check,
    title,
)

SPEC = "tests.broken:BROKEN"

# What is broken -> the check that is meant for it, and words of what it says.
BREAKS: dict[str, tuple[str, str]] = {
    "another version": ("it_states_its_name_and_api", "written for version 2"),
    "upper case": ("its_parameters_are_described", "'Label'"),
    "help of two lines": ("its_parameters_are_described", "not one line"),
    "secret with a default": ("its_parameters_are_described", "is a secret, and has a default"),
    "upper signature": ("its_signature_and_blob_fit_an_auth_token", "lower case"),
    "a long blob": ("its_signature_and_blob_fit_an_auth_token", "at most 4096"),
    "passphrase in the blob": ("its_blob_holds_no_secret", "passphrase stands in its blob"),
    "overwrites": ("generate_never_overwrites_a_file", "was not refused"),
    "readable by others": ("what_it_writes_is_for_its_owner_only", "mode 0644"),
    "leaves a file when it fails": ("a_key_that_cannot_be_made_leaves_no_file", "left a key file behind"),
    "keeps the old passphrase": ("a_changed_passphrase_opens_the_same_key", "wrong passphrase"),
    "one key for all": ("another_key_cannot_unwrap_what_it_wrapped", "was not refused"),
    "forgets to answer": ("keys_of_every_size_come_back", "wrap gave a NoneType for 33 bytes"),
    "answers with another type": ("keys_of_every_size_come_back", "wrap gave a bytearray for 33 bytes"),
    "too short": ("keys_of_every_size_come_back", "another key (32 bytes)"),
    "too long": ("the_longest_key_fits_the_header", "wrap made 513 bytes of 67"),
    "clear inside": ("the_wrapped_key_does_not_hold_the_clear_one", "bytes 0 to 8 of the clear key"),
    "not twice": ("the_same_key_may_be_wrapped_twice", "I have wrapped already"),
    "for this handle only": ("what_was_wrapped_can_be_unwrapped_after_opening_anew", "did not wrap it"),
    "raises at garbage": ("garbage_is_refused", "ModuleFailed was expected, not ValueError at "),
    "leaves at garbage": ("garbage_is_refused", "ModuleFailed was expected, not SystemExit at "),
    "hangs at garbage": ("garbage_is_refused", "it hangs: nothing was heard for 1 s"),
    "takes what was changed": ("a_wrapped_key_that_was_changed_is_refused", "changed: was not refused"),
    "raises at nothing": ("sizes_out_of_range_fail_cleanly", "wrap, of 0 bytes: "),
    "hangs at nothing": ("sizes_out_of_range_fail_cleanly", "it hangs"),
    "two threads share a buffer": ("two_threads_at_once_do_not_disturb_each_other", "another key came back"),
    "repeats after a fork": ("a_forked_process_does_not_repeat_random_numbers", "same random numbers"),
    "slow to open": ("it_answers_while_the_kernel_waits", "s of it to open"),
    "any signature": ("the_signature_of_another_key_is_refused", "signature (0000000000000000): was not refused"),
    "blob breaks it": ("a_blob_that_makes_no_sense_is_refused", "not UnicodeDecodeError at "),
    "any passphrase": ("a_wrong_passphrase_is_refused", "was not refused"),
    "hides that it is locked": ("a_passphrase_that_is_not_at_hand_is_not_its_matter", "Refused was expected"),
    "keeps the passphrase": ("the_secrets_that_it_was_given_are_wiped", "still there"),
    "tries twice": ("a_wrong_pin_is_reported_and_not_tried_again", "a wrong PIN 2 times"),
    "shows the passphrase": ("no_secret_stands_in_what_it_shows", "wrong passphrase stands in"),
    "shows the clear key": ("no_secret_stands_in_what_it_shows", "clear key stands in"),
    "never stale": ("it_is_stale_once_its_file_has_changed", "it is not stale"),
    "slowly stale": ("stale_is_quick", "ms at best"),
    "raises without its file": ("without_its_token_it_fails_cleanly", "wrap, without the key's file"),
    "raises without its file at open": ("without_its_token_it_fails_cleanly", "open, without the key's file"),
    "raises when it was closed": ("once_closed_it_fails_cleanly", "unwrap, after it was closed"),
    "closing breaks calls": ("closing_harms_no_call_under_way", "AttributeError at "),
    "leaves a process": ("it_leaves_no_process_behind", "left 1 processes behind"),
    "comes back twice": ("it_leaves_no_process_behind", "left 1 processes behind"),
    "other in a process of its own": ("in_a_process_of_its_own_it_does_the_same", "did not wrap it"),
}


@pytest.fixture(autouse=True)
def _found_by_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))


def made(folder: Path, fault: str) -> Made:
    module = broken.Module(fault)
    return make_key(module, module, folder, spec=SPEC)


class TestSound(KeyModuleContract):
    """Of the module that is not broken, nothing is said."""

    def make(self, tmp_path: Path) -> Made:
        return made(tmp_path, "none")


def outcome(check: Check, fault: str, folder: Path) -> str:
    """What the check says of a module with this fault; "" if it keeps the contract."""
    files = folder / check.__name__
    (files / "key").mkdir(parents=True)
    (files / "more").mkdir()
    prompt = 0.015 if fault == "slow to open" else 10
    patience = 1.0 if "hangs" in fault and check.__name__ == BREAKS[fault][0] else 30.0
    try:
        run_check(check, Subject(made(files / "key", fault), files / "more", patience=patience, prompt=prompt))
    except ContractBroken as error:
        return str(error)
    return ""


@pytest.mark.parametrize("fault", BREAKS)
def test_each_break_is_seen_by_the_check_that_is_meant_for_it(fault: str, tmp_path: Path) -> None:
    name, words = BREAKS[fault]
    said = {check.__name__: outcome(check, fault, tmp_path) for check in CHECKS}
    assert {name: text for name, text in said.items() if text}.keys() == {name}, said
    assert words in said[name]


def test_every_check_has_a_break_that_it_sees() -> None:
    assert {name for name, _ in BREAKS.values()} == {check.__name__ for check in CHECKS}


def test_the_title_of_a_check_is_its_name_as_a_sentence() -> None:
    assert title(CHECKS[0]) == "it states its name and api"


def test_a_check_that_does_not_apply_says_why(tmp_path: Path) -> None:
    key = made(tmp_path, "none")._replace(maker=None)
    check = next(check for check in CHECKS if check.__name__ == "generate_never_overwrites_a_file")
    with pytest.raises(NotApplicable, match="how to make another key was not said"):
        run_check(check, Subject(key, tmp_path))

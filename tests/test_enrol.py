"""What every key goes through before it is used, with good and bad modules."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pinned import FAULTS, PIN, PinnedKey
from upcall.core.errors import ModuleFailed, Refused, UsageError
from upcall.keymodule import API, Enrolled, Limits, Making, Parameter, Secrets
from upcall.keys.enrolment import chosen, open_and_prove, prove, take_in
from upcall.testing.secrets import GivenSecrets
from upcall.testing.toy import TOY, make_toy_key

PARAMETERS = (
    Parameter("bits", "Size.", "3072", choices=("2048", "3072")),
    Parameter("label", "Name."),
    Parameter("kind", "Kind.", "", choices=("a", "b")),
    Parameter("word", "Word.", "", secret=True, choices=("x",)),
)


def test_parameters_not_given_get_their_defaults() -> None:
    assert chosen(PARAMETERS, {"label": "l"}) == {"bits": "3072", "label": "l", "kind": "", "word": ""}
    assert chosen((), {}) == {}


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({}, "'label' must be given: Name."),
        ({"label": "l", "bits": "1"}, "bits=1: 2048, 3072 can be chosen"),
        ({"label": "l", "bits": ""}, "bits=: 2048, 3072 can be chosen"),
        ({"label": "l", "nix": "1"}, "no parameter 'nix': bits, label, kind, word can be given"),
        ({"label": "l", "word": "hush"}, "^word: x can be chosen"),
    ],
)
def test_invalid_parameters_are_refused_without_showing_secrets(given: dict[str, str], why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        chosen(PARAMETERS, given)
    assert "hush" not in str(caught.value)


def test_a_module_without_parameters_refuses_any() -> None:
    with pytest.raises(UsageError, match="no parameter 'bits': none can be given"):
        chosen((), {"bits": "1"})


def test_a_sound_key_passes_its_trial(tmp_path: Path) -> None:
    signature, blob = make_toy_key(tmp_path / "key")
    handle = TOY.open(signature, blob, GivenSecrets())
    prove(handle, Limits())
    prove(handle, Limits(key=1, wrapped=49))


def test_a_key_that_wraps_beyond_the_limits_fails_its_trial(tmp_path: Path) -> None:
    signature, blob = make_toy_key(tmp_path / "key")
    with pytest.raises(ModuleFailed, match="of 67 bytes it made 115, 67 to 114 are possible"):
        prove(TOY.open(signature, blob, GivenSecrets()), Limits(67, 114))


@pytest.mark.parametrize("fault", FAULTS[1:])
def test_a_faulty_key_fails_its_trial(fault: str) -> None:
    with pytest.raises(ModuleFailed):
        prove(PinnedKey(b"s", fault), Limits())


@pytest.mark.parametrize("fault", ["none", "garbage"])
def test_a_key_is_closed_after_its_trial_whether_it_passed_or_not(fault: str) -> None:
    opened: list[PinnedKey] = []

    class Module:
        name, api = "one", API

        def open(self, signature: str, blob: bytes, secrets: Secrets, /) -> PinnedKey:
            opened.append(PinnedKey(b"s", fault))
            return opened[0]

    enrolled = Enrolled("0" * 16, b"", "")
    if fault == "none":
        open_and_prove(Module(), enrolled, GivenSecrets(pins={"card": PIN}), Limits())
    else:
        with pytest.raises(ModuleFailed):
            open_and_prove(Module(), enrolled, GivenSecrets(), Limits())
    assert opened[0].closed


class Importer:
    """Needs a passphrase, or does not."""

    import_parameters: tuple[Parameter, ...] = ()

    def __init__(self, reason: str | None) -> None:
        self.reason, self.seen = reason, list[tuple[bytes, str]]()

    def import_key(self, making: Making, /) -> Enrolled:
        self.seen.append((bytes(making.passphrase), making.source))
        if self.reason is not None and not making.passphrase:
            raise Refused(self.reason)
        return Enrolled("0" * 16, b"", "")


def making(secrets: GivenSecrets) -> Making:
    return Making(Path("/x"), {}, bytearray(), "keyring", Limits(), secrets)


def test_import_asks_for_a_passphrase_only_if_the_module_needs_one() -> None:
    importer, secrets = Importer(None), GivenSecrets(b"word")
    take_in(importer, making(secrets))
    assert importer.seen == [(b"", "none")]
    assert not secrets.given
    importer = Importer("locked")
    take_in(importer, making(secrets))
    assert importer.seen == [(b"", "none"), (b"word", "keyring")]
    assert secrets.wiped()
    with pytest.raises(Refused, match="pin-refused"):
        take_in(Importer("pin-refused"), making(secrets))

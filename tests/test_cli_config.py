"""`upcall config`, and the document that is made from the registry."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.test_config_layers import Places, settle
from tests.test_config_layers import places as places
from upcall import config
from upcall.cli import main
from upcall.config import reference
from upcall.config.keys import TABLES, keys
from upcall.config.lines import spelled
from upcall.config.shown import as_toml, plain
from upcall.config.table import ANY
from upcall.protocols.request_key.key_types import KEY_TYPES, OF_THE_SYSTEM

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(main, ["config", *arguments])


def shown(*arguments: str) -> dict[str, Any]:
    done = run("show", "--json", *arguments)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# --- show ------------------------------------------------------------------------------------------------------


def test_without_files_the_defaults_are_shown(places: Places) -> None:
    found = shown()
    assert [*found] == [spelled(path) for path in keys() if ANY not in path]
    assert found["quota.thresholds"]["value"] == [80, 90]
    assert found["quota.thresholds"]["origin"] == []
    assert found["plugins.allow"]["value"] is None
    assert found["plugins.allow"]["unset"] == "all that are installed"
    done = run("show", "--origin")
    assert done.stdout.count("default") >= len(found)


def test_each_value_is_shown_with_its_file_and_line(places: Places) -> None:
    vendor = places.put("vendor", "[quota]\n\nsettle = 1\nremind = 2\n")
    drop_in = places.put("system", settle(3), "5.toml")
    first = places.put("system", '[plugins]\nallow = ["b", "a"]\n')
    own = places.put("user", '[quota.sink."a lamp"]\nsince = 1979-05-27\n[plugins]\nallow = ["a", "c"]\n')
    found = shown()
    assert found["quota.settle"]["origin"] == [{"file": str(drop_in), "line": 2}]
    assert found["quota.remind"]["origin"] == [{"file": str(vendor), "line": 4}]
    assert found["plugins.allow"]["value"] == ["a"]
    assert found["plugins.allow"]["origin"] == [{"file": str(first), "line": 2}, {"file": str(own), "line": 4}]
    assert found['quota.sink."a lamp".since']["value"] == "1979-05-27"
    assert shown("--system", "plugins.allow")["plugins.allow"]["value"] == ["a", "b"]
    done = run("show", "quota.settle", "--origin")
    assert f"{drop_in}:2" in done.stdout
    assert "Wanted: a number from 0 to 604800; only the system's files can set it." in done.stdout


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("quota.mail", 8),
        ("daemon", 2),
        ("daemon.start", 1),
        ("request-key", len(KEY_TYPES) + len(OF_THE_SYSTEM)),
        ("request-key.cifs.spnego", 1),
        ('request-key."cifs.spnego"', 1),
        ('request-key."cifs.spnego".without-daemon', 1),
    ],
)
def test_show_of_a_table_or_key_lists_only_its_keys(places: Places, name: str, count: int) -> None:
    assert len(shown(name)) == count


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("quota.setle", "did you mean 'quota.settle'?"),
        ("x", "no key or table 'x'"),
        ("", "no key"),
        ("quota.", "no key"),
    ],
)
def test_show_of_an_unknown_key_is_a_usage_error_with_a_suggestion(places: Places, name: str, said: str) -> None:
    done = run("show", name)
    assert done.exit_code == os.EX_USAGE
    assert said in done.stderr


def test_control_characters_in_names_and_values_are_escaped(places: Places) -> None:
    places.put("user", '[quota.sink."\\u001b[31m"]\nx = "\\u001b[0m"\n')
    assert "\x1b" not in run("show", "--origin").stdout


def test_show_of_an_invalid_file_prints_the_error_and_no_values(places: Places) -> None:
    file = places.put("system", "[quota]\nsettle = -1\n")
    done = run("show")
    assert done.exit_code == os.EX_CONFIG
    assert f"{file}:2: quota.settle: must be a number" in done.stderr
    assert done.stdout == ""


# --- check -----------------------------------------------------------------------------------------------------


def checked(*arguments: str) -> tuple[int, dict[str, Any]]:
    done = run("check", "--json", *arguments)
    found: dict[str, Any] = json.loads(done.stdout)
    return done.exit_code, found


def test_check_of_valid_files_finds_no_problems_and_lists_masked_files(places: Places) -> None:
    places.put("vendor", settle(1), "1.toml")
    mask = places.put("system", settle(2), "1.toml")
    code, found = checked()
    assert (code, found["problems"]) == (0, [])
    assert {Path(one["file"]): one["there"] for one in found["files"]} == {
        places.vendor: False, places.vendor.parent / "config.toml.d/1.toml": False, places.system: False,
        mask: True, places.user: False,
    }  # fmt: skip
    assert [one["masked"] for one in found["files"]] == [None, str(mask), None, None, None]
    assert "masked by" in run("check").stdout


def test_check_lists_every_problem_with_its_file_line_and_key(places: Places) -> None:
    system = places.put("system", "[quota]\nsettle = -1\n\n[daemons]\nx = 1\n")
    drop_in = places.put("system", "[quota\n", "1.toml")
    theirs = places.put("system", "", "2.toml", mode=0o666)
    own = places.put("user", "[quota]\nsettle = 1\nsinks = ['a', 'a']\n")
    code, found = checked()
    assert code == os.EX_CONFIG
    assert [(one["file"], one["line"], one["key"]) for one in found["problems"]] == [
        (str(system), 2, "quota.settle"),
        (str(system), 4, "daemons"),
        (str(drop_in), 1, None),
        (str(theirs), None, None),
        (str(own), 2, "quota.settle"),
        (str(own), 3, "quota.sinks"),
    ]
    done = run("check")
    assert done.exit_code == os.EX_CONFIG
    assert done.stderr.count("\n") == 6
    assert f"{own}:2: quota.settle: only the system's configuration can set this" in done.stderr
    assert "wrong: 2" in done.stdout
    assert len(checked("--system")[1]["problems"]) == 4


def test_check_reports_an_unknown_user_by_line(places: Places) -> None:
    file = places.put("system", '[request-key.dns_resolver]\nuser = "nobody-has-this-name"\n')
    done = run("check")
    assert done.exit_code == os.EX_CONFIG
    assert f"{file}:2: request-key.dns_resolver.user: there is no user" in done.stderr


def test_check_of_given_files_applies_the_rules_of_system_or_user_files(places: Places, tmp_path: Path) -> None:
    draft = tmp_path / "draft.toml"
    draft.write_text("[quota]\nsettle = 1\n")
    assert checked(str(draft))[0] == 0
    code, found = checked("--user", str(draft), str(tmp_path / "missing"))
    assert code == os.EX_CONFIG
    assert [(one["line"], one["why"]) for one in found["problems"]] == [
        (2, "only the system's configuration can set this, not a user's own"),
        (None, "is not there"),
    ]
    for drop_in in ("", "1.toml"):  # a user's own files are known by their place
        own = places.put("user", "[quota]\nsettle = 1\n", drop_in)
        assert checked(str(own))[0] == os.EX_CONFIG


def test_check_reports_a_drop_in_folder_with_unsafe_permissions(places: Places) -> None:
    folder = places.put("system", "", "1.toml").parent
    folder.chmod(0o777)
    code, found = checked()
    assert (code, found["problems"][0]["file"]) == (os.EX_CONFIG, str(folder))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777


# --- values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (frozenset({"b", "a"}), '["a", "b"]'),
        (("é", 1, 2.5, True), '["é", 1, 2.5, true]'),
        ({"a": {"b": (1,)}}, '{"a": {"b": [1]}}'),
    ],
    ids=["set", "list", "table"],
)
def test_values_are_printed_as_toml(value: object, text: str) -> None:
    assert as_toml(value) == text
    assert json.loads(text) == plain(value)


# --- the document ----------------------------------------------------------------------------------------------


def test_the_configuration_document_is_current() -> None:
    file = ROOT / "docs" / "configuration.md"
    assert reference.written(file.read_text()) == file.read_text(), "run `make docs`"


def test_the_configuration_document_names_every_table_and_key_once(tmp_path: Path) -> None:
    file = tmp_path / "x.md"
    file.write_text(f"before\n{reference.BEGIN}was here\n{reference.END}after\n")
    reference.main([str(file)])
    text = file.read_text()
    assert text.startswith(f"before\n{reference.BEGIN}")
    assert text.endswith(f"{reference.END}after\n")
    assert "was here" not in text
    for table in TABLES:
        name = table.family[0] if table.family else table.name.replace(ANY, "NAME")
        assert text.count(f"### `[{name}]`") == 1
        assert all(f"`{key.name}`" in text for key in table.keys if key.name != ANY)
    reference.main([str(file)])
    assert file.read_text() == text
    with pytest.raises(ValueError, match="no marks"):
        reference.written("nothing")


def test_the_examples_in_the_configuration_document_are_valid(places: Places) -> None:
    blocks = (ROOT / "docs" / "configuration.md").read_text().split("```toml\n")[1:]
    assert blocks
    for block in blocks:
        places.put("system", block.partition("```")[0])
        config.read(user=False)

"""Three places with drop-ins: which files count, permissions, which keys each may set, and how they are merged."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upcall import config
from upcall.config import ConfigError
from upcall.config.files import Source, folder_of, sources
from upcall.config.keys import TABLES, find, keys, table_path
from upcall.config.layers import Said, laid_over, nested
from upcall.config.lines import spelled
from upcall.config.table import ANY, SYSTEM, USERS
from upcall.protocols.catalogue import SERVICES
from upcall.protocols.quota.settings import Rules

Put = Callable[..., Path]


class Places(NamedTuple):
    vendor: Path
    system: Path
    user: Path

    def put(self, place: str, text: str, drop_in: str = "", mode: int = 0o644) -> Path:
        main: Path = getattr(self, place)
        file = folder_of(main) / drop_in if drop_in else main
        file.parent.mkdir(parents=True, exist_ok=True)
        file.parent.chmod(0o755)
        file.write_text(text)
        file.chmod(mode)
        return file

    def names(self, user: bool = True) -> list[tuple[str, bool]]:
        """What counts, by place and name; and whether it is masked."""
        found = sources(self.vendor, self.system, self.user if user else None)
        base = self.vendor.parents[1]
        return [(str(source.file.relative_to(base)), source.masked is not None) for source in found]


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    found = Places(*(tmp_path / name / "config.toml" for name in ("usr", "etc", "home/upcall")))
    monkeypatch.setattr(config, "VENDOR", found.vendor)
    monkeypatch.setattr(config, "SYSTEM", found.system)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    assert config.user_file() == found.user
    return found


def settle(seconds: int) -> str:
    return f"[quota]\nsettle = {seconds}\n"


# --- which files -----------------------------------------------------------------------------------------------


def test_files_are_read_by_place_and_then_by_name(places: Places) -> None:
    for place in ("system", "user", "vendor"):
        for name in ("20.toml", "10.toml", "9.toml", "a.toml", ".hidden.toml", "b.toml~", "c.conf"):
            places.put(place, "", f"{name[:-5]}-{place}.toml" if name.endswith(".toml") else name)
    drop_ins = ["10", "20", "9", "a"]
    expected = [
        (f"{folder}/config.toml{more}", False)
        for folder, place in (("usr", "vendor"), ("etc", "system"), ("home/upcall", "user"))
        for more in ["", *(f".d/{name}-{place}.toml" for name in drop_ins)]
    ]
    assert places.names() == expected
    assert places.names(user=False) == expected[:10]


def test_each_file_overrides_those_before_it(places: Places) -> None:
    order = [("vendor", ""), ("vendor", "50-a.toml"), ("system", ""), ("system", "10-b.toml"), ("system", "20-c.toml")]
    for seconds, (place, drop_in) in enumerate(order):
        places.put(place, settle(seconds), drop_in)
        assert config.settings("quota")["settle"] == seconds


def test_a_drop_in_of_the_system_masks_the_vendors(places: Places) -> None:
    places.put("vendor", settle(1), "50-a.toml")
    places.put("vendor", "[quota]\nremind = 1\n", "60-b.toml")
    places.put("system", "", "50-a.toml")
    assert config.settings("quota") == {"remind": 1}
    (folder_of(places.system) / "60-b.toml").symlink_to("/dev/null")
    assert config.settings("quota") == {}
    assert [name for name, masked in places.names() if masked] == [
        "usr/config.toml.d/50-a.toml",
        "usr/config.toml.d/60-b.toml",
        "etc/config.toml.d/60-b.toml",
    ]


def test_a_masked_file_is_not_checked(places: Places) -> None:
    places.put("vendor", "?", "50-a.toml", mode=0o666)
    places.put("system", settle(2), "50-a.toml")
    assert config.settings("quota") == {"settle": 2}


def test_a_users_drop_in_does_not_mask_the_systems(places: Places) -> None:
    places.put("system", '[plugins]\nallow = ["x25519"]\n', "50-a.toml")
    places.put("user", "", "50-a.toml")
    (folder_of(places.user) / "60-a.toml").symlink_to("/dev/null")
    assert config.load().allow == frozenset({"x25519"})


def test_a_symlink_to_a_file_is_followed_and_a_dangling_one_skipped(places: Places) -> None:
    places.put("system", settle(3))
    target = places.put("vendor", settle(4), "elsewhere.conf")
    folder_of(places.system).mkdir(mode=0o755)
    (folder_of(places.system) / "1.toml").symlink_to(target)
    assert config.settings("quota") == {"settle": 4}
    (folder_of(places.system) / "2.toml").symlink_to("/nowhere/at/all")
    assert config.settings("quota") == {"settle": 4}


# --- who may write ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["vendor", "system", "user"])
def test_a_drop_in_that_others_can_write_is_refused(places: Places, place: str) -> None:
    file = places.put(place, "", "a.toml", mode=0o664)
    with pytest.raises(ConfigError, match=f"{file}: mode 0664 lets others write"):
        config.settings("quota", user=True)


@pytest.mark.parametrize("place", ["vendor", "system", "user"])
def test_a_drop_in_folder_that_others_can_write_is_refused(places: Places, place: str) -> None:
    folder = places.put(place, "", "a.toml").parent
    folder.chmod(0o775)
    with pytest.raises(ConfigError, match=f"{folder}: mode 0775 lets others write"):
        config.load()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_file_or_folder_of_another_user_is_refused(places: Places) -> None:
    file = places.put("system", "", "a.toml")
    os.chown(file, 65534, 65534)
    with pytest.raises(ConfigError, match=f"{file}: belongs to uid 65534"):
        config.settings("quota")
    os.chown(file.parent, 65534, 65534)
    with pytest.raises(ConfigError, match=f"{file.parent}: belongs to uid 65534"):
        config.settings("quota")


def test_a_drop_in_folder_or_file_of_the_wrong_type_is_refused(places: Places) -> None:
    folder = folder_of(places.system)
    folder.parent.mkdir()
    folder.write_text("")
    with pytest.raises(ConfigError, match="is not a folder"):
        config.settings("quota")
    folder.unlink()
    (folder / "a.toml").mkdir(parents=True)
    folder.chmod(0o755)
    with pytest.raises(ConfigError, match="is not a regular file"):
        config.settings("quota")


def test_a_symlink_loop_is_refused(places: Places) -> None:
    places.system.parent.mkdir()
    places.system.symlink_to("config.toml")
    with pytest.raises(ConfigError, match="cannot be read: Too many levels"):
        config.settings("quota")
    folder_of(places.system).symlink_to("config.toml.d")
    with pytest.raises(ConfigError, match=r"config.toml.d: cannot be read|cannot be read"):
        config.settings("quota")


# --- who may set what ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [path for path, key in keys().items() if key.scope == SYSTEM], ids=spelled)
def test_a_system_only_key_in_a_users_file_is_refused(path: tuple[str, ...]) -> None:
    text = f"\n{spelled(path)} = 1\n"
    said = Said(Source(Path("/x"), USERS), text)
    assert [str(problem) for problem in said.problems] == [
        f"/x:2: {spelled(path)}: only the system's configuration can set this, not a user's own"
    ]
    assert said.values == {}


def test_users_may_set_exactly_the_keys_of_this_list() -> None:
    """Think before adding a key: a user's file must not change what the broker does."""
    users = {spelled(path[:2]) for path, key in keys().items() if key.scope == USERS}
    assert users == {
        "plugins.allow", "quota.sinks", "quota.system-sinks", "quota.terminal", "quota.mail", "quota.webhook",
        "quota.sink", "keys.lock-after", "keys.lock-on", "keyring.timeout", "keyring.where", "log.requests", "log.to",
        "hardening.writable",
    }  # fmt: skip


def test_a_users_files_can_only_narrow_the_list_of_plugins(places: Places) -> None:
    places.put("vendor", '[plugins]\nallow = ["a"]\n')
    places.put("system", '[plugins]\nallow = ["b", "c", "d"]\n')
    first = places.put("user", '[plugins]\nallow = ["b", "x"]\n')
    assert config.load() == config.Config(frozenset({"b"}), (places.system, first))
    last = places.put("user", '[plugins]\nallow = ["c", "d", "x"]\n', "9.toml")
    assert config.load() == config.Config(frozenset({"c", "d"}), (places.system, last))
    assert config.settings("plugins") == {"allow": frozenset({"b", "c", "d"})}
    places.put("system", "")
    assert config.load().sources == (places.vendor, last)
    places.put("vendor", "")
    assert config.load() == config.Config(frozenset({"c", "d", "x"}), (last,))


def test_every_error_of_a_file_is_reported(places: Places) -> None:
    text = '[daemon]\nstart = []\n[quota]\nsettle = -1\nmail = 3\nwhat = 1\n"""' + "\n"
    said = Said(Source(Path("/x"), SYSTEM), text.replace('"""\n', ""))
    assert [problem.line for problem in said.problems] == [2, 4, 5, 6]
    assert [problem.key for problem in said.problems] == ["daemon.start", "quota.settle", "quota.mail", "quota.what"]


def test_an_error_found_after_parsing_names_the_file_and_line_of_its_key(places: Places) -> None:
    path = ("request-key", "dns_resolver", "user")
    assert str(config.blame(path, "there is no such user")).startswith(f"{places.system}: request-key.dns_resolver")
    file = places.put("vendor", '\n[request-key.dns_resolver]\nuser = "x"\n', "1.toml")
    assert str(config.blame(path, "is not there")) == f"{file}:3: request-key.dns_resolver.user: is not there"


# --- laying over -----------------------------------------------------------------------------------------------

NAMES = st.sampled_from("abc")
FILES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "settle": st.integers(0, 9),
            "sinks": st.lists(NAMES, unique=True, max_size=3),
            "terminal": st.fixed_dictionaries({}, optional={"which": st.sampled_from(["all", "last"])}),
            "sink": st.dictionaries(NAMES, st.dictionaries(NAMES, st.integers(0, 9), max_size=3), max_size=2),
        },
    ),
    max_size=4,
)


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {**below, **above}
    for name in below.keys() & above.keys():
        if isinstance(above[name], dict):
            both[name] = merged(below[name], above[name])
    return both


def said(tables: dict[str, Any], scope: str = SYSTEM) -> Said:
    import tomli_w

    return Said(Source(Path("/x"), scope), tomli_w.dumps(tables))


@given(FILES)
def test_files_are_laid_over_each_other_key_by_key(files: list[dict[str, Any]]) -> None:
    expected: dict[str, Any] = {}
    for one in files:
        sinks = {"sinks": tuple(one["sinks"])} if "sinks" in one else {}
        expected = merged(expected, {**one, **sinks})
    layers = [said({"quota": one}) for one in files]
    assert not [layer.problems for layer in layers if layer.problems]
    assert nested(layers).get("quota", {}) == expected
    for path, setting in laid_over(layers).items():  # the last that names it is named as its origin
        assert setting.by == (next(layer for layer in reversed(layers) if path in layer.values),)


@given(st.lists(st.frozensets(NAMES), max_size=3), st.lists(st.frozensets(NAMES), max_size=3))
def test_no_combination_of_user_files_widens_the_list_of_plugins(
    system: list[frozenset[str]], user: list[frozenset[str]]
) -> None:
    layers = [said({"plugins": {"allow": sorted(one)}}) for one in system]
    layers += [said({"plugins": {"allow": sorted(one)}}, USERS) for one in user]
    found = laid_over(layers).get(("plugins", "allow"))
    expected = [lists[-1] for lists in (system, user) if lists]
    assert (found and found.value) == (frozenset.intersection(*expected) if expected else None)


# --- the registry ----------------------------------------------------------------------------------------------


def test_every_key_has_a_scope_a_description_and_a_valid_default() -> None:
    assert len({table.name for table in TABLES}) == len(TABLES)
    for path, key in keys().items():
        assert find(path) is key
        assert key.scope in (SYSTEM, USERS)
        assert key.about.endswith(".")
        assert (key.default is None) == bool(key.unset), spelled(path)
        if key.default is not None:
            default = list(key.default) if isinstance(key.default, tuple) else key.default
            assert key.kind.checked(default) == key.default
    assert find(("quota",)) is find(("quota", "settle", "x")) is find(("nothing",)) is None
    assert find(("quota", "sink", "lamp", "colour")) is find(("quota", "sink", ANY, ANY))
    assert table_path(TABLES[-1]) == ("quota", "sink", ANY)


def test_documented_defaults_equal_those_of_the_program() -> None:
    known = {spelled(path): key.default for path, key in keys().items()}
    assert known['request-key."cifs.spnego".without-daemon'] == SERVICES["cifs.spnego"].absent
    assert known["request-key.dns_resolver.without-daemon"] == SERVICES["dns_resolver"].absent
    for name, value in Rules()._asdict().items():
        assert known[f"quota.{name.replace('_', '-')}"] == value

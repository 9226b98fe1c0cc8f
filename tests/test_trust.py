"""Root runs only what nobody else can change, and says what it will not run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from upcall.broker.settings import BrokerSettings
from upcall.process import trust
from upcall.process.settings import dumps
from upcall.process.trust import Trust

ROOT = Path(__file__).parents[1]
ATTACKER = 54321  # no account
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def place(folder: Path) -> Iterator[Path]:
    """A folder in /tmp, which is sticky, that is root's own."""
    made = folder.parent / "place"
    made.mkdir(mode=0o755)
    yield made


def faults(path: Path) -> list[str]:
    return [str(fault) for fault in Trust({0}).tree(str(path))]


def package(folder: Path, code: str = "") -> Path:
    made = folder / "planted"
    made.mkdir()
    (made / "__init__.py").write_text(code)
    return made


def plugin(folder: Path, mark: Path) -> Path:
    """An installed key module that leaves a mark when it is imported."""
    code = f"open({str(mark)!r}, 'w').close()\nclass M:\n    name, api, open = 'planted', 1, print\nM = M()\n"
    made = package(folder, code)
    info = folder / "planted-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[upcall.key_modules]\nplanted = planted:M\n")
    return made


# --- files and folders -------------------------------------------------------------------------------------------


def test_folders_and_links_of_root_are_trusted(place: Path) -> None:
    (place / "link").symlink_to(package(place))
    assert faults(place) == [] and faults(place / "link") == []


@pytest.mark.parametrize("mode", [0o666, 0o664, 0o646])
def test_a_file_that_others_can_write_is_not_trusted(place: Path, mode: int) -> None:
    file = package(place) / "__init__.py"
    file.chmod(mode)
    assert faults(place) == [f"{file} has mode {mode:04o}: others can write to it"]


def test_a_file_of_another_user_is_not_trusted(place: Path) -> None:
    file = package(place) / "__init__.py"
    os.chown(file, ATTACKER, ATTACKER)
    assert faults(place) == [f"{file} belongs to uid {ATTACKER}"]


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775])
def test_a_folder_that_others_can_write_is_not_trusted(place: Path, mode: int) -> None:
    """Sticky or not: others can put a module there that is not there yet."""
    place.chmod(mode)
    assert faults(place) == [f"{place} has mode {mode:04o}: others can write to it"]


def test_a_parent_that_others_can_write_is_trusted_only_if_sticky(place: Path) -> None:
    made = package(place)
    place.chmod(0o777)
    assert faults(made) == [f"{place} has mode 0777: others can write to it"]
    place.chmod(0o1777)  # nobody can replace what is root's in it
    assert faults(made) == []
    os.chown(made, ATTACKER, ATTACKER)
    assert faults(made) == [f"{made} belongs to uid {ATTACKER}"]


def test_a_parent_of_another_user_is_not_trusted(place: Path) -> None:
    made = package(place)
    os.chown(place, ATTACKER, ATTACKER)
    assert faults(made) == [f"{place} belongs to uid {ATTACKER}"]


def test_each_link_on_the_way_to_a_file_must_be_trusted(place: Path) -> None:
    """A link of root's to one of the attacker's to a file of root's: the attacker can turn it."""
    made, theirs = package(place), place.parent / "theirs"
    theirs.mkdir()
    (theirs / "link").symlink_to(made)
    (place / "link").symlink_to(theirs / "link")
    assert faults(place / "link") == []
    os.lchown(theirs / "link", ATTACKER, ATTACKER)
    assert faults(place / "link") == [f"{theirs}/link belongs to uid {ATTACKER}"]
    os.lchown(theirs / "link", 0, 0)
    os.chown(theirs, ATTACKER, ATTACKER)
    assert faults(place / "link") == [f"{theirs} belongs to uid {ATTACKER}"]
    assert faults(place) == [f"{theirs} belongs to uid {ATTACKER}"]


def test_a_missing_path_in_a_folder_that_others_can_write_is_not_trusted(place: Path) -> None:
    assert faults(place / "not" / "there") == []
    place.chmod(0o1777)
    assert faults(place / "not" / "there") == [f"{place} has mode 1777: others can write to it"]


def test_files_of_a_trusted_user_are_trusted(place: Path) -> None:
    made = package(place)
    for path in (place, made, made / "__init__.py"):
        os.chown(path, ATTACKER, ATTACKER)
    assert list(Trust({0, ATTACKER}).tree(str(made))) == []


# --- sys.path ----------------------------------------------------------------------------------------------------


def in_process(place: Path, code: str = "") -> list[str]:
    """What a process finds that has the folder in sys.path."""
    program = f"import sys; sys.path.append({str(place)!r}); from upcall.process import trust\n{code}\n"
    done = subprocess.run(
        [sys.executable, "-I", "-c", program + "print(*trust.faults(), sep='\\n', end='')"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.splitlines()


def test_this_installation_is_trusted(place: Path) -> None:
    """All that the tests start as root needs that."""
    assert in_process(place) == []


def test_an_entry_of_sys_path_that_others_can_write_is_not_trusted(place: Path) -> None:
    (place / "planted.pth").write_text("import planted\n")
    place.chmod(0o777)
    assert in_process(place) == [f"{place} has mode 0777: others can write to it"]


def test_a_pth_file_of_another_user_is_not_trusted(place: Path) -> None:
    file = place / "planted.pth"
    file.touch()
    os.chown(file, ATTACKER, ATTACKER)
    assert in_process(place) == [f"{file} belongs to uid {ATTACKER}"]


def test_folders_that_pth_files_add_are_checked_without_running_them(place: Path) -> None:
    """Parsed, not run: by its paths, and by the folders of editable installations."""
    added, editable = place.parent / "added", place.parent / "editable"
    for path in (added, editable):
        path.mkdir()
        os.chown(path, ATTACKER, ATTACKER)
    mark = place.parent / "mark"
    (place / "one.pth").write_text(f"# {place}\nimport os; open({str(mark)!r}, 'w')\n../added\n")
    (place / "__editable___x_finder.py").write_text(f"MAPPING: dict[str, str] = {{'x': {str(editable)!r}}}\n")
    assert sorted(in_process(place)) == sorted(f"{path} belongs to uid {ATTACKER}" for path in (added, editable))
    assert not mark.exists()


def test_a_relative_entry_of_sys_path_is_not_trusted(place: Path) -> None:
    assert in_process(place, "sys.path.insert(0, '')") == ["'' is in sys.path, and is not a whole path"]


def test_an_imported_module_that_others_can_write_is_not_trusted(place: Path) -> None:
    (package(place) / "__init__.py").chmod(0o666)
    found = in_process(place, "import planted")
    assert found == [f"{place}/planted/__init__.py has mode 0666: others can write to it"]


# --- what is refused ---------------------------------------------------------------------------------------------


def run(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """upcall, with the folder in PYTHONPATH, which root may ask for on the command line."""
    return subprocess.run(
        [sys.executable, "-X", "upcall-environment", "-m", *words],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(place), str(ROOT)]),
            "XDG_RUNTIME_DIR": str(place.parent),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("command", ["broker", "daemon"])
def test_broker_and_daemon_of_root_refuse_to_start_from_an_untrusted_folder(
    place: Path, folder: Path, command: str
) -> None:
    place.chmod(0o777)
    done = run(place, f"upcall.{command}", dumps(BrokerSettings(folder)))
    assert done.returncode == os.EX_CONFIG
    assert f"{place}: root would run it, but it has mode 0777" in done.stderr
    assert f"chmod go-w {place}" in done.stderr and "[trust] check = false" in done.stderr


def test_xdg_config_home_does_not_turn_the_check_off_for_root(
    place: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.chmod(0o777)
    config = place.parent / "config" / "upcall"
    config.mkdir(parents=True)
    (config / "config.toml").write_text("[trust]\ncheck = false\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(config.parent))
    assert run(place, "upcall.broker", dumps(BrokerSettings(folder))).returncode == os.EX_CONFIG


def test_the_systems_configuration_turns_the_refusal_off(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from upcall import config

    place.chmod(0o777)
    monkeypatch.syspath_prepend(str(place))
    with pytest.raises(config.ConfigError, match="root would run it"):
        trust.require()
    file = place.parent / "config.toml"
    file.write_text("[trust]\ncheck = false\n")
    monkeypatch.setattr(config, "SYSTEM", file)
    assert [fault.path for fault in trust.require()] == [str(place)]


def test_root_loads_no_plugin_that_another_can_write(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from upcall.core.errors import ModuleFailed
    from upcall.keys.plugins import load

    mark = place.parent / "mark"
    made = plugin(place, mark)
    monkeypatch.syspath_prepend(str(place))
    (made / "more.py").touch()
    os.chown(made / "more.py", ATTACKER, ATTACKER)
    with pytest.raises(ModuleFailed, match=f"more.py belongs to uid {ATTACKER}"):
        load("planted:M")
    assert not mark.exists()


@pytest.mark.parametrize("how", ["the plugin's file", "the folder it lies in"])
def test_doctor_does_not_run_a_planted_plugin(place: Path, how: str) -> None:
    mark = place.parent / "mark"
    made = plugin(place, mark)
    words = ("upcall", "doctor", "--json", "--runtime", str(place.parent / "broker"))
    for _ in range(5):  # on a busy machine doctor's check gives up before the plugin was imported
        run(place, *words)
        if mark.exists():
            break
    assert mark.exists()  # else what follows shows nothing
    mark.unlink()
    if how == "the plugin's file":
        os.chown(made / "__init__.py", ATTACKER, ATTACKER)
    else:
        place.chmod(0o777)
    done = run(place, *words)
    assert "no plugin was imported" in done.stdout, done.stdout + done.stderr
    assert not mark.exists()


def test_a_users_own_daemon_is_warned_and_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.chmod(0o777)
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert f"{place} has mode 0777: others can write to it" in map(str, trust.require())

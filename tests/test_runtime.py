"""Where broker, daemon and requesters find each other, and folders that are not to be trusted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from upcall.broker.settings import BrokerSettings
from upcall.core.errors import UsageError
from upcall.kernel.local import connect, listen
from upcall.process import paths as runtime
from upcall.process.paths import Place, find_place, own_place, user_folder
from upcall.process.settings import dumps
from upcall.testing.processes import Started

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give things away")
ME = os.geteuid()


def test_a_folder_of_our_own_is_made(tmp_path: Path) -> None:
    place = own_place(tmp_path / "a" / "b")
    assert place.folder.is_dir()
    assert own_place(tmp_path / "a" / "b") == place


def test_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(UsageError):
        own_place(tmp_path / "link")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises((UsageError, FileExistsError)):
        own_place(tmp_path / "dangling")


def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    for mode in (0o777, 0o775, 0o1777):
        (tmp_path / "open").mkdir(exist_ok=True)
        (tmp_path / "open").chmod(mode)
        with pytest.raises(UsageError):
            own_place(tmp_path / "open")


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises((UsageError, FileExistsError)):
        own_place(tmp_path / "file")


@root_only
def test_a_folder_of_another_uid_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", 65534, 65534)
    with pytest.raises(UsageError):
        own_place(tmp_path / "theirs")
    with Started(["-m", "upcall.broker", dumps(BrokerSettings(tmp_path / "theirs"))], tmp_path / "log") as broker:
        assert broker.wait() == 69
        assert "not a folder of our own" in broker.log


def test_a_broker_is_roots_or_outside_the_systems_folder_the_users_own(tmp_path: Path) -> None:
    """The system's is root's; elsewhere it may be the user's own."""
    assert Place(runtime.SYSTEM_FOLDER).owners() == frozenset({0})
    assert Place(tmp_path).owners() == frozenset({0, ME})


def test_the_users_folder_is_private_and_its_broker_is_found_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert user_folder() == tmp_path / "upcall"
    assert user_folder().stat().st_mode & 0o777 == 0o700
    assert find_place() == Place(runtime.SYSTEM_FOLDER)
    listener = listen(tmp_path / "upcall" / "broker.sock", 0o600)
    assert find_place() == Place(tmp_path / "upcall")
    listener.close()
    (tmp_path / "upcall").chmod(0o777)
    with pytest.raises(UsageError):
        user_folder()


@root_only
def test_a_runtime_folder_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after su(1)."""
    os.chown(tmp_path, 65534, 65534)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert user_folder().parent != tmp_path


def test_listening_on_a_socket_in_use_is_refused_and_on_a_stale_one_works(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    first = listen(path, 0o600)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(UsageError, match="another process listens there already: `upcall status`"):
        listen(path, 0o600)
    first.accept()[0].close()  # that was the one who asked whether somebody is there
    first.close()
    listen(path, 0o600).close()  # nobody listens there any more
    assert [one.name for one in tmp_path.iterdir()] == ["sock"]


def test_connecting_to_a_listener_of_another_uid_is_refused(tmp_path: Path) -> None:
    listener = listen(tmp_path / "sock", 0o600)
    with pytest.raises(UsageError, match="listens there"):
        connect(tmp_path / "sock", frozenset({ME + 1}))
    listener.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's daemon is the machine's")
def test_root_has_a_folder_without_a_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "SYSTEM_FOLDER", tmp_path)
    for told in ("/run/user/0", ""):
        monkeypatch.setenv("XDG_RUNTIME_DIR", told)
        assert runtime.user_folder() == tmp_path / "root"

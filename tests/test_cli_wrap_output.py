"""Where `upcall wrap` and `upcall unwrap` write: no binary to a terminal unasked, files as a whole with mode 0600."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from upcall.cli import wrap
from upcall.core.errors import UsageError


def test_binary_data_is_not_written_to_a_terminal_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with pytest.raises(UsageError, match="-o FILE"):
        wrap._check_terminal(None, binary=True)
    wrap._check_terminal(None, binary=False)
    wrap._check_terminal(Path("-"), binary=True)
    wrap._check_terminal(Path("file"), binary=True)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    wrap._check_terminal(None, binary=True)


def test_a_file_is_replaced_as_a_whole_with_mode_0600(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_bytes(b"before")
    file.chmod(0o644)
    link.symlink_to(file)
    with file.open("rb") as old:
        wrap._write(link, b"after")
        assert old.read() == b"before"
    assert (file.read_bytes(), stat.S_IMODE(file.stat().st_mode)) == (b"after", 0o600)
    assert link.is_symlink() and {one.name for one in tmp_path.iterdir()} == {"file", "link"}


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for place in (tmp_path / "fifo", tmp_path, tmp_path / "missing/file"):
        with pytest.raises(OSError) as caught:
            wrap._write(place, b"x")
        assert caught.value.filename == str(place)
    assert [one.name for one in tmp_path.iterdir()] == ["fifo"]

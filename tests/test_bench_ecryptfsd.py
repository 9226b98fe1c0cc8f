"""The peer ecryptfsd: what is downloaded is pinned, and what is preloaded changes two paths only."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import ecryptfsd, native
from bench.stage import Stage
from upcall.testing.lab import LabUnavailable

MODULES = str(ecryptfsd.MODULE_FOLDER)


def play_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has apt-get leave packages of the right names and other contents."""

    def succeed(command: list[str], folder: Path) -> None:
        assert command[:2] == ["apt-get", "download"]
        for package in command[2:]:
            (folder / f"{package.replace('=', '_')}_amd64.deb").write_bytes(b"another")

    monkeypatch.setattr(ecryptfsd, "_private_apt", lambda *_: ["apt-get"])
    monkeypatch.setattr(ecryptfsd, "_archive", lambda *_: "")
    monkeypatch.setattr(ecryptfsd, "_succeed", succeed)


def test_a_package_that_is_not_the_pinned_one_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play_download(monkeypatch)
    with pytest.raises(LabUnavailable, match=r"libssl1\.1_.* is not the pinned one: its SHA-256 is not aadf8b4b"):
        ecryptfsd.build_older(tmp_path)
    assert list((tmp_path / ecryptfsd.OLDER).iterdir()) == []


def test_without_the_older_openssl_the_row_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def succeed(command: list[str], folder: Path) -> None:
        raise LabUnavailable("apt-get failed:\nE: The repository has no Release file.")

    monkeypatch.setattr(ecryptfsd, "_archive", lambda *_: "")
    monkeypatch.setattr(ecryptfsd, "_succeed", succeed)
    older, why = native.older(tmp_path)
    assert older is None
    assert why == "OpenSSL 1.1.1 cannot be had: apt-get failed: E: The repository has no Release file."


def test_a_source_that_has_changed_is_not_compiled(tmp_path: Path) -> None:
    code = tmp_path / "src/key_mod/ecryptfs_key_mod_openssl.c"
    code.parent.mkdir(parents=True)
    code.write_text("int nothing;\n")
    with pytest.raises(LabUnavailable, match="is not what it was: it has no 'key->n'"):
        ecryptfsd._compile(tmp_path, [], tmp_path / "module.so")


# --- the preloaded library -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def preload() -> Iterator[Path]:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler (cc)")
    with Stage() as stage:
        stage.compile()
        yield stage.folder / "preload.so"


def preloaded(preload: Path, code: str, inherits: int, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "import os\n" + code],
        env={**os.environ, "LD_PRELOAD": str(preload), **variables},
        pass_fds=[inherits] if inherits >= 0 else [],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_opening_the_device_gives_a_new_descriptor_of_the_inherited_one(preload: Path) -> None:
    reader, writer = os.pipe()
    code = (
        "for _ in range(2): fd = os.open('/dev/ecryptfs', os.O_RDWR | os.O_CLOEXEC); os.write(fd, b'x'); os.close(fd)"
    )
    preloaded(preload, code, writer, BENCH_DEVICE=str(writer))
    os.close(writer)
    assert os.read(reader, 10) == b"xx"
    os.close(reader)


def test_other_files_are_opened_and_created_as_usual(preload: Path, tmp_path: Path) -> None:
    create = f"os.close(os.open({str(tmp_path / 'new')!r}, os.O_CREAT | os.O_WRONLY, 0o640))"
    code = f"{create}\nprint(open('/proc/version').read())"
    assert "Linux" in preloaded(preload, code, -1, BENCH_DEVICE="0")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640


def test_key_modules_are_read_from_the_given_folder(preload: Path, tmp_path: Path) -> None:
    (tmp_path / "module.so").touch()
    code = f"print(os.listdir({MODULES!r}), len(os.listdir('/proc/self')) > 5)"
    assert preloaded(preload, code, -1, BENCH_KEY_MODULES=str(tmp_path)) == "['module.so'] True"


def test_a_folder_whose_name_only_begins_alike_is_another(preload: Path, tmp_path: Path) -> None:
    code = f"try: os.listdir({MODULES + '-other'!r})\nexcept FileNotFoundError: print('none')"
    assert preloaded(preload, code, -1, BENCH_KEY_MODULES=str(tmp_path)) == "none"


def test_a_key_module_is_loaded_from_the_given_folder(preload: Path, tmp_path: Path) -> None:
    shutil.copy(preload, tmp_path / "module.so")
    code = f"import ctypes; ctypes.CDLL({MODULES + '/module.so'!r}); print(open('/proc/self/maps').read())"
    assert str(tmp_path / "module.so") in preloaded(preload, code, -1, BENCH_KEY_MODULES=str(tmp_path))

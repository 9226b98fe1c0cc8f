"""What is installed is pinned by hashes, and what is built is the same wherever it is built."""

from __future__ import annotations

import gzip
import io
import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

from release import version
from release.build import epoch, files, packed_anew, projects, stage
from upcall.keys import plugins

ROOT = Path(__file__).parents[1]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
PROJECTS = [folder / "pyproject.toml" for folder in projects()]


def pinned(path: Path) -> dict[str, int]:
    """How many hashes each name has; a name without a version is none."""
    found: dict[str, int] = {}
    for entry in re.split(r"\n(?=\S)", path.read_text().strip()):
        name = re.match(r"([a-z0-9-]+)==\S+", entry)
        assert name is not None, entry
        found[name[1]] = found.get(name[1], 0) + len(re.findall(r"--hash=sha256:[0-9a-f]{64}(?=\s|$)", entry))
    return found


def wanted(path: Path, *extras: str) -> set[str]:
    told = tomllib.loads(path.read_text())
    project = told["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    names = {re.split(r"[^A-Za-z0-9_.-]", one)[0] for entries in lists for one in entries}
    return {name.lower().replace("_", "-") for name in names} - {"upcall"}


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_every_version_has_hashes_and_no_file_an_address(path: Path) -> None:
    assert all(pinned(path).values())
    assert not re.search(r"://|--index-url|--extra-index|--find-links|--trusted|file:|@", path.read_text())


def test_all_that_the_projects_name_is_pinned() -> None:
    setup, runtime = (pinned(ROOT / "requirements" / f"{name}.txt") for name in ("setup", "runtime"))
    for path in PROJECTS:
        assert wanted(path) <= runtime.keys() <= setup.keys()
    assert wanted(PROJECTS[0], "dev") <= setup.keys()
    assert "setuptools" in setup  # builds all of them


def test_what_users_install_has_the_versions_that_are_tested() -> None:
    versions = [
        dict(re.findall(r"^([a-z0-9-]+)==(\S+)", (ROOT / "requirements" / name).read_text(), re.MULTILINE))
        for name in ("runtime.txt", "setup.txt")
    ]
    assert versions[0].items() <= versions[1].items()


def bounds(path: Path) -> dict[str, set[str]]:
    """Name -> the lower bounds that this project has for it, in any of its lists."""
    project = tomllib.loads(path.read_text())["project"]
    lists = [project["dependencies"], *project.get("optional-dependencies", {}).values()]
    found: dict[str, set[str]] = {}
    for entry in (entry for entries in lists for entry in entries if not entry.startswith("upcall")):
        name, bound = re.fullmatch(r"([A-Za-z0-9_-]+)>=([0-9.]+)", entry).groups()  # type: ignore[union-attr]
        found.setdefault(name.lower().replace("_", "-"), set()).add(bound)
    return found


def test_all_projects_have_the_same_lower_bound_of_a_dependency() -> None:
    found: dict[str, set[str]] = {}
    for path in PROJECTS:
        for name, versions in bounds(path).items():
            found.setdefault(name, set()).update(versions)
    assert {name: versions for name, versions in found.items() if len(versions) > 1} == {}


def test_all_packages_have_one_version_and_need_each_other_in_that_version() -> None:
    found = version.written()
    assert {one for versions in found.values() for one in versions} == {version.version()}
    for path in PROJECTS[1:]:
        dependencies = tomllib.loads(path.read_text())["project"]["dependencies"]
        assert f"upcall=={version.version()}" in dependencies, path
        assert len(found[path]) == 2


def test_each_plugin_is_an_extra_or_part_of_upcalls_own_package() -> None:
    told = tomllib.loads(PROJECTS[0].read_text())
    extras = {name: entries for name, entries in told["project"]["optional-dependencies"].items() if name != "dev"}
    everything = extras.pop("all")
    assert everything == [f"upcall[{','.join(sorted(extras))}]"]
    names = {re.split(r"[\[=]", entry)[0] for entries in extras.values() for entry in entries} - {"prometheus_client>"}
    assert names == {f"upcall-{path.parent.name}" for path in PROJECTS[1:]}
    included = {Path(path).name for path in told["tool"]["setuptools"]["packages"]["find"]["where"]} - {""}
    assert included | {path.parent.name for path in PROJECTS[1:]} == {path.name for path in ROOT.glob("plugins/*")}


def test_the_entry_points_of_the_included_plugins_load() -> None:
    points = tomllib.loads(PROJECTS[0].read_text())["project"]["entry-points"]["upcall.key_modules"]
    assert set(points) == {"openssl", "passphrase", "x25519"}
    for name, spec in points.items():
        assert plugins.load(spec).name == name


def test_a_new_version_is_written_everywhere(tmp_path: Path) -> None:
    for path in version.places():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    version.write("2.0.0rc1", tmp_path)
    assert version.version(tmp_path) == "2.0.0rc1"
    found = version.written(tmp_path)
    assert len(found) == len(PROJECTS) + 3
    assert {one for versions in found.values() for one in versions} == {"2.0.0rc1"}
    for path in found:
        before = (ROOT / path.relative_to(tmp_path)).read_text()
        assert path.read_text() == before.replace(version.version(), "2.0.0rc1"), path


@pytest.mark.parametrize("text", ["", "2", "v2.0", "2.0.dev", "2.0\n", '2.0"'])
def test_what_is_no_version_is_refused_and_nothing_written(text: str) -> None:
    with pytest.raises(SystemExit, match="not a version"):
        version.write(text, Path("/nonexistent"))


def sdist(mtime: int, mode: int, owner: str, names: list[str]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.mtime, member.mode, member.uname, member.size = mtime, mode, owner, len(name)
            archive.addfile(member, io.BytesIO(name.encode()))
    return out.getvalue()


def test_an_sdist_is_the_same_whatever_its_makers_user_clock_and_umask() -> None:
    one = packed_anew(sdist(1, 0o600, "ada", ["b", "a"]), 1_700_000_000)
    other = packed_anew(sdist(2, 0o664, "bob", ["a", "b"]), 1_700_000_000)
    assert one == other
    with tarfile.open(fileobj=io.BytesIO(one)) as archive:
        told = [(one.name, one.mode, one.mtime, one.uname) for one in archive.getmembers()]
        assert told == [("a", 0o644, 1_700_000_000, ""), ("b", 0o644, 1_700_000_000, "")]
    assert gzip.decompress(one) != gzip.decompress(packed_anew(sdist(1, 0o700, "ada", ["a", "b"]), 1_700_000_000))


def test_a_source_date_before_1980_becomes_1980(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    assert epoch() == 315532800


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the repository, not only its files")
def test_only_what_git_knows_is_built(tmp_path: Path) -> None:
    stage(tmp_path, 1_700_000_000)
    there = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert there <= {name for name, _ in files()}
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()} <= {0o644, 0o755}


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the repository, not only its files")
def test_wheels_and_sdists_are_the_same_when_all_else_differs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "release.check"], cwd=ROOT, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("the same") == 2 * len(PROJECTS)

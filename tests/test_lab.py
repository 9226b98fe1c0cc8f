"""The lab's parts that need no machine."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import stat
import subprocess
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from tests.kernel.groups import FILES, Group, groups
from upcall.cli import main
from upcall.testing.lab import LabUnavailable, cpio, doctor, guest, image, kernellog, packages, qemu, run, uml, why_not
from upcall.testing.lab.doctor import checks
from upcall.testing.lab.ending import MarkedStream
from upcall.testing.lab.machine import CONSOLE_TAIL, last_words
from upcall.testing.lab.modules import load_order
from upcall.testing.lab.results import staging
from upcall.testing.lab.start import PORTS, Machine

# --- cpio -----------------------------------------------------------------------------------------


def members(archive: bytes) -> list[tuple[str, int, bytes]]:
    """A reader of our own, from the kernel's description of the format."""
    found: list[tuple[str, int, bytes]] = []
    at = 0
    while True:
        assert at % 4 == 0
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        size, name_size = fields[6], fields[11]
        name = archive[at + 110 : at + 110 + name_size]
        assert name.endswith(b"\0")
        data_at = (at + 110 + name_size + 3) // 4 * 4
        at = (data_at + size + 3) // 4 * 4
        if name == b"TRAILER!!!\0":
            assert at == len(archive)
            return found
        found.append((name[:-1].decode(), fields[1], archive[data_at : data_at + size]))


def test_cpio_adds_the_folders_that_hold_an_entry_once_and_before_it() -> None:
    made = cpio.archive([cpio.file("a/b/one", b"1" * 5, 0o755), cpio.file("a/two", b""), cpio.link("a/l", "two")])
    assert members(made) == [
        ("a", stat.S_IFDIR | 0o755, b""),
        ("a/b", stat.S_IFDIR | 0o755, b""),
        ("a/b/one", stat.S_IFREG | 0o755, b"11111"),
        ("a/two", stat.S_IFREG | 0o644, b""),
        ("a/l", stat.S_IFLNK | 0o777, b"two"),
    ]


def test_cpio_keeps_the_permissions_of_a_folder_named_first() -> None:
    made = cpio.archive([cpio.folder("a", 0o700), cpio.file("a/f", b"x"), cpio.folder("a")])
    assert [(name, mode & 0o777) for name, mode, _ in members(made)] == [("a", 0o700), ("a/f", 0o644)]


@given(st.lists(st.tuples(st.from_regex(r"[a-z]{1,9}", fullmatch=True), st.binary(max_size=9)), max_size=5))
def test_cpio_archives_in_a_row_stay_aligned(contents: list[tuple[str, bytes]]) -> None:
    made = cpio.archive(cpio.file(name, data) for name, data in contents)
    assert [(name, data) for name, _, data in members(made)] == contents


@pytest.mark.skipif(shutil.which("cpio") is None, reason="there is no cpio to compare with")
def test_the_cpio_command_reads_our_archive() -> None:
    made = cpio.archive([cpio.file("a/one", b"1"), cpio.link("b", "a")])
    listed = subprocess.run(["cpio", "-it", "--quiet"], input=made, capture_output=True, check=True).stdout
    assert listed.decode().split() == ["a", "a/one", "b"]


# --- modules --------------------------------------------------------------------------------------

MODULES_DEP = """\
kernel/fs/9p/9p.ko: kernel/net/9p/9pnet.ko kernel/fs/fscache/fscache.ko kernel/fs/netfs/netfs.ko
kernel/fs/fscache/fscache.ko: kernel/fs/netfs/netfs.ko
kernel/fs/netfs/netfs.ko:
kernel/net/9p/9pnet.ko.xz:
kernel/net/9p/9pnet.ko:
kernel/drivers/some-thing.ko.xz: kernel/net/9p/9pnet.ko
"""


def test_each_module_comes_after_all_it_needs_and_only_once() -> None:
    order = load_order(MODULES_DEP, ["9p", "some_thing", "netfs"])
    assert order == [
        "kernel/net/9p/9pnet.ko",
        "kernel/fs/netfs/netfs.ko",
        "kernel/fs/fscache/fscache.ko",
        "kernel/fs/9p/9p.ko",
        "kernel/drivers/some-thing.ko.xz",
    ]


def test_an_unknown_module_is_named() -> None:
    with pytest.raises(KeyError, match="nosuch"):
        load_order(MODULES_DEP, ["nosuch"])


def test_modules_that_need_each_other_are_an_error() -> None:
    with pytest.raises(ValueError, match="needs itself"):
        load_order("a.ko: b.ko\nb.ko: a.ko\n", ["a"])


# --- the kernel's log -----------------------------------------------------------------------------

KMSG = b"""\
6,339,5140900,-;ecryptfs: loaded
 SUBSYSTEM=misc
2,340,6000000,-;kernel BUG at lib/list_debug.c:26!
12,341,6100000,-;a program says Oops
4,342,6200000,-;list_add corruption. next->prev should be prev
4,343,63"""


def test_only_lines_of_the_kernel_itself_count_as_faults() -> None:
    assert kernellog.faults(KMSG) == [
        "kernel BUG at lib/list_debug.c:26!",
        "list_add corruption. next->prev should be prev",
    ]


def test_the_log_reads_as_dmesg_prints_it() -> None:
    assert kernellog.readable(KMSG).splitlines()[:2] == [
        "<6>[    5.140900] ecryptfs: loaded",
        "<2>[    6.000000] kernel BUG at lib/list_debug.c:26!",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "BUG: kernel NULL pointer dereference, address: 0000000000000008",
        "Oops: 0002 [#1] PREEMPT SMP NOPTI",
        "usercopy: Kernel memory exposure attempt detected from SLUB object",
        "general protection fault, probably for non-canonical address",
        "list_del corruption. prev->next should be",
        "Kernel panic - not syncing: sysrq triggered crash",
    ],
)
def test_an_oops_a_bug_and_a_panic_count_as_faults(text: str) -> None:
    assert kernellog.faults(b"1,1,1,-;" + text.encode()) == [text]
    assert kernellog.console_faults(f"[    1.0] {text}\r\n[    1.1] all is well\r\n") == [f"[    1.0] {text}"]


def test_ordinary_lines_are_no_fault() -> None:
    assert kernellog.faults(b"6,1,1,-;Spectre V2 : Mitigation\n6,2,2,-;x86: DEBUG: on\n4,3,3,-;BUGs\n") == []


# --- the end of a stream --------------------------------------------------------------------------


@given(st.lists(st.sampled_from(["E", "EN", "END-", "x", "END-EN", "EE"])), st.integers(1, 5))
def test_a_stream_gives_all_before_the_mark_however_it_is_cut(parts: list[str], size: int) -> None:
    mark = b"END-END"
    data = "".join(parts).encode().replace(mark, b"")
    if mark in data or mark in (data + mark)[:-1]:
        return
    stream, got = MarkedStream(mark), b""
    whole = data + mark
    for at in range(0, len(whole), size):
        assert not stream.complete
        got += stream.feed(whole[at : at + size])
    assert stream.complete
    assert got == data
    assert stream.feed(b"late") == b""


def test_a_stream_without_its_mark_still_gives_everything() -> None:
    stream = MarkedStream(b"END")
    assert stream.feed(b"all EN") + stream.rest() == b"all EN"
    assert not stream.complete


# --- what the guest is told -----------------------------------------------------------------------

ODD = ["a b", "", "'", '"', "$HOME", "`id`", "new\nline", "--", "-n", "*", "\\", "x=y", "é", "\udcff"]


def session(argv: list[str], cwd: Path, **env: str) -> guest.Session:
    return guest.Session(argv, cwd, "mark", "6.1", Path("/cache/modules"), env)


SHOW = """
import os, sys
os.write(1, "\\0".join([os.getcwd(), *sys.argv[1:]]).encode(errors="surrogateescape"))
"""


def test_odd_arguments_and_folders_arrive_as_they_are(tmp_path: Path) -> None:
    cwd = tmp_path / "a 'b' $c"
    cwd.mkdir()
    script = tmp_path / "script"
    script.write_bytes(guest.files(session(["python3", "-c", SHOW, *ODD], cwd, ODD="a'b"))["lab/command"])
    done = subprocess.run(["/bin/sh", str(script)], capture_output=True, check=True)
    assert done.stdout.split(b"\0") == [os.fsencode(text) for text in [str(cwd), *ODD]]


def test_the_guests_command_does_not_get_the_hosts_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    script = guest.command_script(session(["/usr/bin/env"], tmp_path, EXTRA="a b"))
    shown = subprocess.run(["/bin/sh", "-c", script], capture_output=True, check=True, text=True).stdout
    assert "SECRET" not in shown
    assert "EXTRA=a b\n" in shown
    assert "UPCALL_LAB_RESULTS=/results\n" in shown


def test_only_paths_below_folders_that_the_guest_empties_are_hidden() -> None:
    paths = [Path("/tmp/x/y"), Path("/tmp"), Path("/usr/lib"), Path("/home/u/venv"), Path("/home/u")]
    assert guest.hidden(paths) == [Path("/home/u"), Path("/home/u/venv"), Path("/tmp/x/y")]


def test_parent_folders_that_others_cannot_enter_are_found(tmp_path: Path) -> None:
    inner = tmp_path / "private" / "open"
    inner.mkdir(parents=True)
    inner.chmod(0o755)
    inner.parent.chmod(0o700)
    found = guest.closed([inner])
    assert inner.parent in found
    assert inner not in found


def test_the_scripts_are_valid_shell() -> None:
    for name in ("init.sh", "furnish.sh", "session.sh", "qemu.sh", "uml.sh"):
        script = Path(guest.__file__).with_name(name)
        subprocess.run(["/bin/sh", "-n", str(script)], check=True)


# --- QEMU -----------------------------------------------------------------------------------------


def machine(tmp_path: Path) -> Machine:
    kernel = image.Image(tmp_path, "6.1")
    return Machine(kernel, tmp_path / "initramfs", tmp_path / "console", tmp_path / "r,s", 512, 1)


def test_a_comma_in_a_folder_does_not_end_an_option(tmp_path: Path) -> None:
    line = qemu.command_line(machine(tmp_path), dict.fromkeys(PORTS, 9))
    assert any(f"path={tmp_path}/r,,s,mount_tag=results" in option for option in line)


def test_the_hosts_files_are_shared_read_only(tmp_path: Path) -> None:
    line = qemu.command_line(machine(tmp_path), dict.fromkeys(PORTS, 9))
    (host,) = [option for option in line if "mount_tag=host" in option]
    assert "readonly=on" in host.split(",")


# --- a machine that died --------------------------------------------------------------------------


def test_a_long_trace_does_not_hide_why_the_kernel_panicked(tmp_path: Path) -> None:
    died = machine(tmp_path)
    trace = "".join(f"[    3.5{number:04}]  ? somewhere+{number:#x}\n" for number in range(CONSOLE_TAIL))
    died.console.write_text(f"[    3.400000] Kernel panic - not syncing: sysrq triggered crash\n{trace}")
    said = last_words(died, booted=True).splitlines()
    assert said[0] == "the machine ended before the command did"
    assert said[1].endswith("Kernel panic - not syncing: sysrq triggered crash")
    assert len(said) == 2 + CONSOLE_TAIL


# --- User-mode Linux ------------------------------------------------------------------------------


def test_every_port_is_a_serial_line_and_nothing_else_is_connected(tmp_path: Path) -> None:
    descriptors = {name: number for number, name in enumerate(PORTS, start=20)}
    line = uml.command_line(machine(tmp_path), descriptors)
    assert [word for word in line if word.startswith("ssl")] == [
        "ssl=null",
        *("ssl1=fd:20,fd:20", "ssl2=fd:21,fd:21", "ssl3=fd:22,fd:22", "ssl4=fd:23,fd:23"),
    ]
    for number, name in enumerate(PORTS, start=1):
        fragment = Path(guest.__file__).with_name("uml.sh")
        found = subprocess.run(["/bin/sh", "-c", f". {shlex.quote(str(fragment))}; port {name}"], capture_output=True)
        assert found.stdout.decode() == f"/dev/ttyS{number}\n"


def test_the_guests_memory_goes_where_there_is_room_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uml, "SHARED_MEMORY", tmp_path / "nowhere")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert uml.memory_folder(1) == tmp_path
    with pytest.raises(LabUnavailable, match="TMPDIR"):
        uml.memory_folder(1 << 40)


def children() -> str:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text()


def test_a_kernel_that_cannot_be_run_is_unavailable_and_leaves_no_guardian(tmp_path: Path) -> None:
    before = children()
    with (
        socket.socket() as port,
        pytest.raises(LabUnavailable, match="vmlinuz: No such file"),
        uml.running(machine(tmp_path), dict.fromkeys(PORTS, port)),
    ):
        pass
    assert children() == before


def test_an_unknown_kernel_is_named() -> None:
    with pytest.raises(ValueError, match=r"no kernel 'hurd'; it has qemu, uml"):
        run(["true"], kernel="hurd")
    with pytest.raises(ValueError, match="no kernel 'hurd'"):
        why_not("hurd")


def test_user_mode_linux_has_one_processor_and_no_ecryptfs_messages() -> None:
    with pytest.raises(ValueError, match="one processor"):
        run(["true"], kernel="uml", cpus=2)
    for line in ("run --kernel uml --cpus 2 true", "ecryptfs --kernel uml"):
        refused = CliRunner().invoke(main, ["lab", *line.split()])
        assert refused.exit_code == os.EX_USAGE
        assert "User-mode Linux has" in refused.output


# --- which tests run where ------------------------------------------------------------------------


def test_files_of_ring_3_are_grouped_by_their_names() -> None:
    names = ["test_files.py", "test_device.py", "test_plugin_new.py", "test_cifs_failures.py", "test_cifs.py"]
    names += ["test_cifs_idmap.py", "test_quota_ext4.py", "test_login_systemd.py", "test_units.py", "test_link.py"]
    common = {
        "link": Group("qemu", ("test_link.py",)),
        "ecryptfs": Group("qemu", ("test_device.py", "test_files.py", "test_plugin_new.py")),
        "requests": Group("qemu", ("test_cifs.py", "test_cifs_failures.py", "test_cifs_idmap.py")),
        "systemd": Group("qemu", ("test_login_systemd.py",), Path("/usr/lib/systemd/systemd")),
    }
    assert groups(names) == common | {
        "requests-uml": Group("uml", ("test_cifs.py", "test_cifs_failures.py")),
        "machine": Group("qemu", ("test_units.py",)),
        "machine-uml": Group("uml", ("test_quota_ext4.py",)),
    }
    assert groups(names, uml=False) == common | {"machine": Group("qemu", ("test_quota_ext4.py", "test_units.py"))}


def test_where_user_mode_linux_cannot_run_no_file_of_ring_3_runs_twice_or_not_at_all() -> None:
    found = [file for group in groups(FILES, uml=False).values() for file in group.files]
    assert sorted(found) == FILES


# --- results --------------------------------------------------------------------------------------


def test_results_are_merged_and_nothing_else_stays(tmp_path: Path) -> None:
    target = tmp_path / "target"
    (target / "both").mkdir(parents=True)
    (target / "both" / "old").write_text("old")
    (target / "file").write_text("before")
    with staging(target) as written:
        assert stat.S_IMODE(written.stat().st_mode) == 0o1777
        assert stat.S_IMODE(written.parent.stat().st_mode) == 0o700
        (written / "both").mkdir()
        (written / "both" / "new").write_text("new")
        (written / "file").write_text("after")
        (written / "link").symlink_to("/etc")
    assert sorted(str(path.relative_to(target)) for path in target.rglob("*")) == [
        "both",
        "both/new",
        "both/old",
        "file",
        "link",
    ]
    assert (target / "file").read_text() == "after"
    assert (target / "link").is_symlink()


def test_a_failed_run_gives_its_results_too(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), staging(tmp_path / "new") as written:
        (written / "file").write_text("x")
        raise RuntimeError
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_a_file_takes_the_place_of_a_folder_and_the_other_way_round(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").write_text("x")
    with staging(tmp_path) as written:
        (written / "one").write_text("file")
        (written / "two").mkdir()
    assert (tmp_path / "one").read_text() == "file"
    assert (tmp_path / "two").is_dir()


# --- the cache ------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "upcall" / "lab"


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for Debian's archive, which has one kernel; gives the list of what was downloaded."""
    downloaded: list[str] = []

    def make(kernel: str, temporary: Path, say: packages.Say) -> Path:
        downloaded.append(kernel)
        made = temporary / "made"
        made.mkdir()
        (made / "release").write_text(kernel.removeprefix("linux-image-") + "\n")
        return made

    monkeypatch.setattr(packages, "missing_tools", list)
    monkeypatch.setattr(packages, "kernel_package", lambda: "linux-image-6.1.0-1-amd64")
    monkeypatch.setattr(packages, "candidate", lambda package: "1:6.1.1-1")
    monkeypatch.setattr(image, "_make", make)
    return downloaded


def quiet(text: str) -> None:
    """Reports no progress."""


def test_a_kernel_is_fetched_once(cache: Path, archive: list[str]) -> None:
    assert image.cached() is None
    first = image.ensure(quiet)
    assert (first.release, image.ensure(quiet)) == ("6.1.0-1-amd64", first)
    assert image.fetch(quiet) == first
    assert archive == ["linux-image-6.1.0-1-amd64"]
    assert sorted(path.name for path in cache.iterdir()) == ["current", first.folder.name]


def test_first_runs_at_the_same_time_leave_one_complete_image(cache: Path, archive: list[str]) -> None:
    fetched: list[image.Image] = []
    threads = [threading.Thread(target=lambda: fetched.append(image.fetch(quiet))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(fetched) == 4
    assert set(fetched) == {image.cached()}
    assert sorted(path.name for path in cache.iterdir()) == ["current", fetched[0].folder.name]


def test_an_older_kernel_is_removed_once_it_is_no_longer_in_use(
    cache: Path, archive: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = image.fetch(quiet)
    monkeypatch.setattr(packages, "kernel_package", lambda: "linux-image-6.1.0-2-amd64")
    with old.in_use():
        image.fetch(quiet)
        assert old.folder.is_dir()
    new = image.fetch(quiet)
    assert not old.folder.exists()
    assert image.cached() == new


def test_the_two_kernels_are_cached_side_by_side(cache: Path, archive: list[str]) -> None:
    done = CliRunner().invoke(main, ["lab", "fetch"])
    assert done.exit_code == 0
    assert archive == ["linux-image-6.1.0-1-amd64", "user-mode-linux"]
    one, other = image.cached(), image.cached(image.UML)
    assert one is not None
    assert other is not None
    assert (one.of, other.of, one.folder.parent) == (image.QEMU, image.UML, other.folder.parent)
    assert len({one.folder, other.folder}) == 2


def test_one_kernel_is_fetched_alone(cache: Path, archive: list[str]) -> None:
    assert CliRunner().invoke(main, ["lab", "fetch", "--kernel", "uml"]).exit_code == 0
    assert archive == ["user-mode-linux"]
    assert image.cached() is None


# --- what is missing, and the remedy --------------------------------------------------------------


@pytest.fixture
def nothing_installed(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


@pytest.mark.usefixtures("nothing_installed")
def test_the_doctor_names_every_remedy() -> None:
    found = CliRunner().invoke(main, ["lab", "doctor"])
    assert found.exit_code == os.EX_UNAVAILABLE
    assert "apt-get install --no-install-recommends qemu-system-x86" in found.output
    assert "apt-get, apt-cache, dpkg-deb not found" in found.output


@pytest.mark.usefixtures("nothing_installed")
def test_the_doctor_reports_missing_tools_and_remedies_as_json() -> None:
    found = CliRunner().invoke(main, ["lab", "doctor", "--json"])
    assert found.exit_code == os.EX_UNAVAILABLE
    missing = {check["name"] for check in json.loads(found.output) if not check["met"]}
    assert {"qemu-system-x86_64", "apt and dpkg", "kernel and busybox"} <= missing
    assert all(check["remedy"] for check in json.loads(found.output) if not check["met"])


@pytest.mark.usefixtures("nothing_installed")
def test_why_not_is_one_line_with_the_remedy() -> None:
    reason = why_not()
    assert reason is not None
    assert reason.startswith("qemu-system-x86_64: not found (apt-get install")
    reason = why_not("uml")
    assert reason is not None
    assert reason.startswith(("apt and dpkg: ", "processor state: "))


@pytest.mark.parametrize(("flags", "told"), [("fpu avx512f", False), ("fpu amx_bf16 amx_tile", True)])
def test_user_mode_linux_is_refused_on_processors_whose_state_it_cannot_keep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, told: bool
) -> None:
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: {flags}\n")
    monkeypatch.setattr(doctor, "PROCESSORS", tmp_path / "cpuinfo")
    assert ("processor state: has AMX" in (why_not("uml") or "")) == told


@pytest.mark.usefixtures("nothing_installed")
def test_the_doctor_tells_the_kernels_apart() -> None:
    found = json.loads(CliRunner().invoke(main, ["lab", "doctor", "--json"]).output)
    assert {check["kernel"] for check in found if check["name"] == "kernel and busybox"} == {"qemu", "uml"}
    only = json.loads(CliRunner().invoke(main, ["lab", "doctor", "--json", "--kernel", "uml"]).output)
    assert only == [check for check in found if check["kernel"] == "uml"]


def test_a_system_that_forbids_tracing_cannot_run_user_mode_linux(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scope").write_text("3\n")
    monkeypatch.setattr(doctor, "PTRACE_SCOPE", tmp_path / "scope")
    reason = why_not("uml")
    assert reason is not None
    assert reason.startswith("ptrace: forbidden to all (boot with")


@pytest.mark.usefixtures("nothing_installed")
def test_a_run_without_tools_names_what_is_missing() -> None:
    done = CliRunner().invoke(main, ["lab", "run", "--", "true"])
    assert done.exit_code == os.EX_UNAVAILABLE
    assert "not found" in done.output
    with pytest.raises(LabUnavailable, match="apt-get"):
        run(["true"])


def test_a_cache_that_cannot_be_written_makes_the_lab_unavailable(
    tmp_path: Path, archive: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(LabUnavailable, match="cache folder"):
        image.fetch(quiet)


def test_a_user_with_empty_lists_of_apt_is_told_to_update_them(
    cache: Path, archive: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "kernel_package", lambda: None)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(LabUnavailable, match="apt-get update"):
        image.fetch(quiet)
    (kernel,) = [check for check in checks() if check.name == "kernel and busybox"]
    assert not kernel.met
    assert "apt-get update" in kernel.remedy


def test_no_command_is_a_usage_error() -> None:
    assert CliRunner().invoke(main, ["lab", "run"]).exit_code == os.EX_USAGE
    with pytest.raises(ValueError, match="no command"):
        run([])


def test_options_after_the_command_are_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def stop(argv: object, **options: object) -> None:
        seen.append(argv)
        raise LabUnavailable("far enough")

    monkeypatch.setattr("upcall.testing.lab.machine.run", stop)
    for line in ("run ls --timeout -x", "run -- ls --timeout -x", "run --cpus 1 ls --timeout -x"):
        assert CliRunner().invoke(main, ["lab", *shlex.split(line)]).exit_code == os.EX_UNAVAILABLE
    assert seen == [("ls", "--timeout", "-x")] * 3


def test_the_shell_without_a_terminal_is_a_usage_error() -> None:
    assert CliRunner().invoke(main, ["lab", "shell"]).exit_code == os.EX_USAGE

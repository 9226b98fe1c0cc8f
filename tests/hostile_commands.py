"""Calls every command with hostile values and hostile standard streams, and reports what came of it as JSON.

A process of its own, of an ordinary user, with one thread, whose home, runtime folder and working directory are below
the folder that is its argument. The commands and their parameters are taken from click's tree, so that a new option is
covered without a word here.

What a command would do outside of that folder is cut off where it would begin, after it was parsed and checked:

    execve                   of `broker`, `daemon`, `quota serve` and `session`: those processes have their own tests
    virtual machines         `lab`: booting takes minutes, and fetching kernels needs a network
    the demo                 `demo`: takes half a minute; has a test of its own
    checks of plugins        `plugin check`: take seconds each; have tests of their own
    serving                  `metrics --listen`: has no end
    the kernel's keyring     auth tokens of this user are not added or removed: they would outlive the test
    messages to people       `quota test`
    looking for packages     `lab doctor`: takes seconds

`setup` and `request-key install` run to the end: an ordinary user may not change the system, and images that --root
names are below the folder.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import click

from upcall.cli import main
from upcall.process import start_python as startpython

PATIENCE = 120.0  # seconds, after which a command counts as hanging; a busy machine makes all of them slow
SYSEXITS = {0, 1, *range(os.EX_USAGE, os.EX_CONFIG + 1), 128 + signal.SIGINT, 128 + signal.SIGPIPE}

NUMBERS = ["-1", "-3", "0", "nan", "inf", "-inf", "1e10", "1e400", "99999999999", "9" * 5000, "0x10", "1e", "", " "]
TEXTS = [
    "",
    "-",
    "nosuch",
    "x" * 100_000,
    "\x1b[2J\x07\r\t",
    "two\nlines",
    "\udcff\udcfe",
    "../../../etc/passwd",
    "=",
    "a=b",
    "%s{0}{x!r}",
    "日本語",
    "-1",
    "99999999999",
    "/",
    "a/b",
    ":",
]
FORBIDDEN = re.compile(
    r"Traceback|\[Errno|<class |object at 0x|PosixPath|bytearray\(|(?<![\w=/])b['\"]|Exception ignored"
    r"|getpwuid\(|getgrnam\(|\b[A-Z]\w+Error\b|internal error|\bNone\b|\x1b|\x07"
)
# Commands that report several findings on standard error by their nature, one in each line.
REPORTS = {("config", "check"), ("key", "list"), ("ecryptfs", "inspect"), ("ecryptfs", "cat"), ("ecryptfs", "rewrap")}


class Case(NamedTuple):
    path: tuple[str, ...]
    parameter: str  # whose value is hostile; "" if all are
    arguments: tuple[str, ...]
    kind: str = ""  # the name of the parameter's type


class Ended(NamedTuple):
    code: int | str
    stdout: str
    stderr: str


class _Hangs(BaseException):
    pass


# --- cases -------------------------------------------------------------------------------------------------------


def commands(group: click.Group, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    ctx = click.Context(group, info_name="upcall")
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        assert command is not None
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)


def paths(folder: Path) -> list[str]:
    """Makes what may be wrong with a path. Returns the paths."""
    (folder / "a-folder").mkdir()
    (folder / "a-folder/inner").write_text("x")
    (folder / "a-file").write_bytes(b"\x00\xff" * 5000)
    (folder / "empty").touch()
    (folder / "closed").touch(0o000)
    (folder / "closed-folder").mkdir(0o000)
    (folder / "dangling").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "fifo")
    (folder / os.fsdecode(b"not-utf8-\xff\x1b[2J\n")).write_text("x")
    names = [
        "missing",
        "missing/below",
        "a-folder",
        "a-file",
        "a-file/below",
        "empty",
        "closed",
        "closed-folder",
        "closed-folder/below",
        "dangling",
        "loop",
        "fifo",
        os.fsdecode(b"not-utf8-\xff\x1b[2J\n"),
        "x" * 300,
        "x/" * 3000,
    ]
    return [*(str(folder / name) for name in names), "", "-", "/dev/full", "/dev/null", "/proc/self/mem"]


def values(kind: Any, places: Sequence[str]) -> Sequence[str]:
    if isinstance(kind, click.Path):
        return places
    if kind.name in ("integer", "float", "integer range", "float range"):
        return NUMBERS
    if isinstance(kind, click.Choice):
        return TEXTS[:7]
    return [*TEXTS, *NUMBERS[3:8], *places[:3]]


# What required arguments are, where another parameter is hostile.
FITTING = {
    "name": ["present"],
    "key": ["present"],
    "service": ["cifs.spnego"],
    "uid": ["1"],
    "argv": ["true"],
    "shell": ["bash"],
    "to": ["present"],
}
# What keeps a command from waiting, or from taking long; unless it is the hostile parameter.
QUICK = {
    ("wrap",): ["--timeout=0.01"],
    ("unwrap",): ["--timeout=0.01"],
    ("quota", "watch"): ["--timeout=0.01"],
    ("key", "generate"): ["--module=x25519", "--no-passphrase", "--no-add"],
    ("key", "import"): ["--no-add"],
    ("demo",): ["--keys=10", "--bits=2048"],
}


SLOW = {("doctor",)}  # tried with fewer paths


def fitting(path: tuple[str, ...], command: click.Command, but: str, file: str) -> tuple[list[str], list[str]]:
    """Returns options and arguments with which the command would be called, without the parameter `but`."""
    options = [word for word in QUICK.get(path, []) if word.partition("=")[0].lstrip("-").replace("-", "_") != but]
    arguments: list[str] = []
    for one in command.params:
        if one.name == but or not one.required:
            continue
        words = FITTING.get(str(one.name), [file])
        if isinstance(one, click.Argument):
            arguments += words
        else:
            options += [one.opts[0], *(words * max(1, one.nargs))[: max(1, one.nargs)]]
    return options, arguments


def cases(path: tuple[str, ...], command: click.Command, places: Sequence[str]) -> Iterator[Case]:
    file = places[3]
    options, arguments = fitting(path, command, "", file)
    group = isinstance(command, click.Group)
    ends: list[str] = [] if group else [*options, "--", *arguments]
    yield Case(path, "", (*path,))
    yield Case(path, "", (*path, *ends))
    for unknown in ("--nosuch", "-Z", "--\udcff", "--\x1b[2J", f"--{'x' * 10000}"):
        yield Case(path, "", (*path, unknown, *ends))
    for unknown in ("", "\x1b[2J\n", "\udcff"):
        yield Case(path, "", (*path, *ends, unknown, unknown))
    for one in command.params:
        name = str(one.name)
        places = places[:: 3 if path in SLOW else 1]
        kind = "path" if isinstance(one.type, click.Path) else ""
        options, arguments = fitting(path, command, name, file)
        if isinstance(one, click.Argument):
            for value in values(one.type, places):
                count = max(1, one.nargs)
                yield Case(path, name, (*path, *options, "--", *arguments, *[value] * count), kind)
        elif getattr(one, "is_flag", False) or getattr(one, "count", False):
            for option in (*one.opts, *one.secondary_opts):
                yield Case(path, name, (*path, *options, option, "--", *arguments))
                if option.startswith("--"):
                    yield Case(path, name, (*path, *options, f"{option}=x", "--", *arguments))
        else:
            yield Case(path, name, (*path, *options, *arguments, one.opts[0]))  # without a value
            for value in values(one.type, places):
                count = max(1, one.nargs)
                tail = ["--", *arguments] if not group else []
                yield Case(path, name, (*path, *options, one.opts[0], *[value] * count, *tail), kind)


# --- one call ----------------------------------------------------------------------------------------------------


def _stream(buffer: io.BytesIO) -> io.TextIOWrapper:
    return io.TextIOWrapper(buffer, "utf-8", "surrogateescape", write_through=True)


_raised: list[str] = []  # exceptions in threads, and in destructors


def call(arguments: Sequence[str], stdin: bytes = b"k" * 16) -> Ended:
    """Calls the program in this process."""
    out, err = io.BytesIO(), io.BytesIO()
    kept = sys.stdin, sys.stdout, sys.stderr
    sys.stdin, sys.stdout, sys.stderr = _stream(io.BytesIO(stdin)), _stream(out), _stream(err)
    signal.setitimer(signal.ITIMER_REAL, 0.05 if _endless(arguments) else PATIENCE)
    code: int | str
    try:
        main.main(list(arguments), "upcall")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else f"exit code {error.code!r}"
    except BaseException as error:  # noqa: BLE001 - the end of the test's patience, too
        code = f"{type(error).__name__}: {error}"
    else:
        code = "no exit"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        texts = [buffer.getvalue().decode("utf-8", "surrogateescape") for buffer in (out, err)]
        sys.stdin, sys.stdout, sys.stderr = kept
    return Ended(code, *texts)


def wrong(case: Case, ended: Ended) -> str:
    """Returns what is wrong with how a command ended; "" if nothing is."""
    if ended.code not in SYSEXITS:
        return f"code {ended.code}"
    if _raised:
        return _raised.pop()
    if case.parameter and "" in case.arguments and case.kind == "path" and ended.code != os.EX_USAGE:
        return f"takes an empty path: code {ended.code}"
    texts = ended.stderr if case.path in (("manual",), ("completion",)) else ended.stdout + ended.stderr
    if found := FORBIDDEN.search(texts):
        return f"prints {found[0]!r}"
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("upcall: note: ")]
    if lines and lines[0].startswith("Usage: ") and ended.code == os.EX_USAGE:
        return ""  # a group without a command
    if lines and lines[-1].startswith("Try `"):
        lines.pop()
    if len(lines) > 1 and case.path not in REPORTS:
        return f"{len(lines)} lines of errors"
    if ended.code in range(os.EX_USAGE, os.EX_CONFIG + 1) and not lines and not ended.stdout:
        return f"exit code {ended.code} without a word"
    return ""


# --- what is cut off ---------------------------------------------------------------------------------------------


def cut_off() -> None:
    def parsed(*_: object, **__: object) -> NoReturn:
        raise SystemExit(0)

    os.execve = parsed
    for place, replacement in (
        ("upcall.testing.lab.machine.run", parsed),
        ("upcall.testing.lab.image.fetch", parsed),
        ("upcall.cli.demo._Stage.__enter__", parsed),
        ("upcall.testing.checking.check_plugin", lambda *_: iter(())),
        ("upcall.observe.metrics_server.server", parsed),
        ("upcall.kernel.keyring.add_user_key", lambda *_: 1),
        ("upcall.kernel.keyring.unlink", lambda *_: None),
        ("upcall.cli.quotatest.tell_all", lambda *_: []),
        ("upcall.cli.lab.checks", lambda *_: []),
    ):
        owner, _, name = place.rpartition(".")
        try:
            found: Any = importlib.import_module(owner)
        except ImportError:
            above, _, inner = owner.rpartition(".")
            found = getattr(importlib.import_module(above), inner)
        assert hasattr(found, name), place
        setattr(found, name, replacement)


def _alarm(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt if _endless(_running) else _Hangs(f"still running after {PATIENCE:g} s")


def _endless(arguments: Sequence[str]) -> bool:
    """Returns whether a command runs until Ctrl-C, or waits for the end of a file
    that has none, or for the writer of a FIFO."""
    if arguments[:2] == ("quota", "watch"):
        return not any(word.startswith("--timeout") for word in arguments)
    return bool({"--follow", "-f"}.intersection(arguments)) or (
        arguments[:1] == ("log",) and arguments[-1].endswith(("/fifo", "/dev/full"))
    )


_running: Sequence[str] = ()


@contextlib.contextmanager
def _served(folder: Path) -> Iterator[None]:
    """A context with a broker and a daemon of this user, so that commands come beyond their absence."""
    processes = []
    with (folder / "log").open("wb") as log:
        for words in (("broker", "--no-ecryptfs"), ("daemon", "--ask=agent")):
            command = startpython.command("upcall", *words)
            processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
            place = folder / "run/upcall" / ("broker.sock" if words[0] == "broker" else "daemon.sock")
            end = time.monotonic() + 60
            while not place.exists():
                assert processes[-1].poll() is None and time.monotonic() < end, (folder / "log").read_text()
                time.sleep(0.01)
        try:
            yield
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(20)


def _home(folder: Path) -> None:
    folder.mkdir(0o700, exist_ok=True)
    for name in ("run", "data", "config", "cache", "work", "home"):
        (folder / name).mkdir(0o700)
    os.environ |= {
        "HOME": str(folder / "home"),
        "XDG_RUNTIME_DIR": str(folder / "run"),
        "XDG_DATA_HOME": str(folder / "data"),
        "XDG_CONFIG_HOME": str(folder / "config"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "TMPDIR": str(folder / "work"),
        "TERM": "dumb",
    }
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "PYTHON_KEYRING_BACKEND"):
        os.environ.pop(name, None)
    os.chdir(folder / "work")


# --- standard streams --------------------------------------------------------------------------------------------

CLOSED = -1
STREAMS: dict[str, tuple[str | int, str | int, str | int]] = {
    # standard input, output and error: a path, CLOSED, or "pipe" for a pipe whose reader has ended
    "full output": ("/dev/null", "/dev/full", "captured"),
    "closed pipe": ("/dev/null", "pipe", "captured"),
    "closed input": (CLOSED, "/dev/null", "captured"),
    "closed output": ("/dev/null", CLOSED, "captured"),
    "closed error": ("/dev/null", "/dev/null", CLOSED),
    "full error": ("/dev/null", "/dev/null", "/dev/full"),
    "all closed": (CLOSED, CLOSED, CLOSED),
}


def _opened(number: int, place: str, captured: Path) -> int:
    if place == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
        return writer
    if place == "captured":
        place = str(captured)
    return os.open(os.devnull if place == str(CLOSED) else place, os.O_WRONLY if number else os.O_RDONLY)


def with_streams(arguments: Sequence[str], streams: Sequence[str | int], captured: Path) -> Ended:
    """Calls the program in a child of this process, whose streams are as those of a program that was started so."""
    captured.write_bytes(b"")
    pid = os.fork()
    if not pid:
        code = 99
        try:
            opened = [_opened(number, str(place), captured) for number, place in enumerate(streams)]
            for number, place in enumerate(streams):
                os.close(number) if place == CLOSED else os.dup2(opened[number], number)
            os.closerange(3, 64)
            signal.setitimer(signal.ITIMER_REAL, PATIENCE)
            for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
                stream = None
                if streams[number] != CLOSED:
                    stream = open(number, mode, closefd=False)  # noqa: SIM115
                setattr(sys, name, stream)
                setattr(sys, f"__{name}__", stream)
            try:
                main.main(list(arguments), "upcall")
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 98
            if sys.stdout is not None:
                sys.stdout.flush()  # as the interpreter does at its end
        except BaseException as error:  # noqa: BLE001 - a child must not return
            os.write(2, f"{type(error).__name__}: {error}".encode())
            code = 97
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return Ended(os.waitstatus_to_exitcode(status), "", captured.read_text("utf-8", "surrogateescape"))


def stream_failures(folder: Path, places: Sequence[str]) -> tuple[int, list[dict[str, Any]]]:
    count, failures = 0, []
    for path, command in commands(main):
        options, arguments = fitting(path, command, "", places[3])
        words = (*path, *options, *arguments)
        if path == ("log",):
            words = (*words, places[3])
        for name, streams in STREAMS.items():
            for given in {words, (*path, "--help")}:
                case = Case(path, name, given)
                ended = with_streams(given, streams, folder / "captured")
                count += 1
                why = wrong(case, ended) if streams[2] == "captured" else ""
                if ended.code not in SYSEXITS:
                    why = f"code {ended.code}"
                if not why and "--help" in given:
                    expected = {"full output": os.EX_IOERR, "closed output": os.EX_IOERR, "all closed": os.EX_IOERR}
                    if ended.code != (128 + signal.SIGPIPE if name == "closed pipe" else expected.get(name, 0)):
                        why = f"code {ended.code}"
                if why:
                    failures.append(_failure(case, ended, why))
    return count, failures


# --- all of it ---------------------------------------------------------------------------------------------------


def _failure(case: Case, ended: Ended, why: str) -> dict[str, Any]:
    short = [word if len(word) < 60 else f"{word[:40]}...({len(word)})" for word in case.arguments]
    return {
        "command": " ".join(case.path),
        "parameter": case.parameter,
        "arguments": [os.fsencode(word).decode("utf-8", "backslashreplace") for word in short],
        "why": why,
        "code": ended.code,
        "stdout": ended.stdout[-300:].encode("utf-8", "backslashreplace").decode(),
        "stderr": ended.stderr[-800:].encode("utf-8", "backslashreplace").decode(),
    }


def value_failures(places: Sequence[str], only: Callable[[tuple[str, ...]], bool]) -> tuple[int, int, int, list[Any]]:
    """Returns (commands, parameters, calls, failures)."""
    global _running
    tree = [(path, command) for path, command in [((), main), *commands(main)] if only(path)]
    calls, failures = 0, []
    times: dict[str, float] = {}
    for path, command in tree:
        begun = time.monotonic()
        for case in cases(path, command, places):
            _running = case.arguments
            ended = call(case.arguments)
            calls += 1
            if why := wrong(case, ended):
                failures.append(_failure(case, ended, why))
        times[" ".join(path)] = time.monotonic() - begun
    if "HOSTILE_TIMES" in os.environ:
        for name, seconds in sorted(times.items(), key=lambda item: -item[1])[:12]:
            sys.stderr.write(f"{seconds:6.2f} s  {name}\n")
    return len(tree), sum(len(command.params) for _, command in tree), calls, failures


def run(folder: Path, only: str) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    os.umask(0o077)
    _home(folder)
    threading.excepthook = lambda told: _raised.append(f"a thread raised {told.exc_type.__name__}: {told.exc_value}")
    sys.unraisablehook = lambda told: _raised.append(f"unraisable {told.exc_type.__name__}: {told.exc_value}")
    words = tuple(only.split())
    signal.signal(signal.SIGALRM, _alarm)
    with _served(folder):
        cut_off()
        places = paths(folder / "work")
        made = call(["key", "generate", "present", "--module=x25519", "--no-passphrase", "--no-add"])
        assert made.code == 0, made
        number, parameters, calls, failures = value_failures(places, lambda path: path[: len(words)] == words)
        streamed, stream_failed = stream_failures(folder, places) if not words else (0, [])
    return {
        "commands": number,
        "parameters": parameters,
        "calls": calls,
        "streams": streamed,
        "failures": [*failures, *stream_failed],
    }


if __name__ == "__main__":
    where = Path(sys.argv[1])
    report = run(where, " ".join(sys.argv[2:]))
    for closed in ("closed", "closed-folder"):
        with contextlib.suppress(OSError):
            (where / "work" / closed).chmod(0o700)
    shutil.rmtree(where, ignore_errors=True)
    json.dump(report, sys.stdout)

"""Runs a command: its errors become one line on standard error and an exit code of sysexits.h.

Also the ends that no command expects: Ctrl-C, SIGTERM, SIGHUP, a full disk, a closed pipe, closed descriptors.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Final, NoReturn

import click

from upcall.cli import output
from upcall.cli.commands import NoCommand
from upcall.cli.output import for_terminal
from upcall.core import reasons
from upcall.core.errors import ModuleFailed, Refused, UpcallError, UsageError, error_words

# Exit codes of sysexits.h, by the name of the error's class: avoids importing the classes.
_CODES: Final = {
    "FileNotFoundError": os.EX_NOINPUT,
    "IsADirectoryError": os.EX_NOINPUT,
    "NotADirectoryError": os.EX_NOINPUT,
    "FileExistsError": os.EX_CANTCREAT,
    "PermissionError": os.EX_NOPERM,
    "BlockingIOError": os.EX_TEMPFAIL,
    "UsageError": os.EX_USAGE,
    "PeerError": os.EX_DATAERR,
    "ModuleFailed": os.EX_DATAERR,
    "TimedOut": os.EX_TEMPFAIL,
    "TimeoutError": os.EX_TEMPFAIL,
    "NoBroker": os.EX_UNAVAILABLE,
    "NoDaemon": os.EX_UNAVAILABLE,
    "NoMountSource": os.EX_UNAVAILABLE,
    "NoJournal": os.EX_UNAVAILABLE,
    "NoPassphrase": os.EX_UNAVAILABLE,
    "ConfigError": os.EX_CONFIG,
    "BadLine": os.EX_CONFIG,
    "OrderFailed": os.EX_OSERR,
    "OSError": os.EX_OSERR,
    "UpcallError": os.EX_SOFTWARE,
}
_LONGEST: Final = 2000  # characters of an error: a name from the command line may be of any length
_STREAMS: Final = ("standard input", "standard output", "standard error")


def exit_code(error: BaseException) -> int:
    """Returns the exit code for a command that failed with this error."""
    cause = error.__cause__
    if isinstance(error, UsageError | ModuleFailed) and isinstance(cause, OSError):
        error = cause  # the cause is more specific: a file that could not be opened
    if isinstance(error, OSError) and error.filename in _STREAMS:
        return os.EX_IOERR
    if isinstance(error, Refused):
        return reasons.exit_code(error.reason)
    return next((_CODES[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in _CODES), 1)


def error_text(error: UpcallError | OSError) -> str:
    """Returns the error as one line for people, with the file if it concerns one, without an errno's number, and with
    the command that helps, if it is known. Control characters are escaped: names of files may be another user's."""
    if not isinstance(error, UpcallError):
        return for_terminal(error_words(error))
    from upcall.cli.remedies import with_remedy  # completion needs none

    return for_terminal(with_remedy(error))


def run(command: Callable[[], Any]) -> int:
    """Runs a command of click's, whose result is an exit code or None. Returns the exit code; tells about errors on
    standard error."""
    output.reset()
    _take_standard_streams()
    with _ended_by_signals():
        code = _caught(lambda: _interruptible(command))
        # Buffered output may fail only now. A closed pipe and a full disk are told of, and do not fail again at exit.
        return _caught(_flush) or code


def _interruptible(command: Callable[[], Any]) -> Any:
    """Runs a command, which Ctrl-C ends by KeyboardInterrupt. Before and after it, SIGINT ends the process at once,
    if upcall/__main__.py has begun it: nothing would catch the exception there."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_DFL:
        return command()
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return command()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


class OutputClosed(Exception):
    """The reader of standard output has ended. Instead of BrokenPipeError, which click turns into an exit code."""


def _caught(command: Callable[[], Any]) -> int:
    """Runs a function, and returns the exit code for its result or its error."""
    try:
        return command() or os.EX_OK
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else os.EX_OK if error.code is None else 1
    except _Ended as error:
        return error.code
    except KeyboardInterrupt:
        return interrupted()
    except click.Abort as error:
        if isinstance(error.__cause__ or error.__context__, KeyboardInterrupt):
            return interrupted()
        return _fail("nothing was done: no answer, or no", 1)
    except NoCommand as error:
        _echo(error.help)
        return os.EX_USAGE
    except click.ClickException as error:
        return _usage(error)
    except (BrokenPipeError, OutputClosed):
        _drop_output()
        return 128 + signal.SIGPIPE  # as of a process that SIGPIPE ends, without a word
    except (UpcallError, OSError) as error:
        if isinstance(error, OSError) and error.filename in _STREAMS:
            _drop_output()
        for cause in _causes(error):
            output.detail(f"caused by {type(cause).__name__}: {for_terminal(str(cause))}")
        return _fail(error_text(error), exit_code(error))
    except UnicodeEncodeError as error:  # a name from the command line; files and their contents are decoded
        return _fail(f"'{error.object[:80]}' is not UTF-8", os.EX_USAGE)
    except Exception as error:  # noqa: BLE001 - a fault of this program; people are not shown a traceback unasked
        if output.verbose():
            import traceback

            _echo(traceback.format_exc())
        text = f"internal error: {type(error).__name__}: {error}; please report it, with what --verbose prints"
        return _fail(text, os.EX_SOFTWARE)


def _fail(text: str, code: int) -> int:
    text = for_terminal(text)
    _echo(f"upcall: {text if len(text) <= _LONGEST else text[:_LONGEST] + '...'}")
    return code


def _usage(error: click.ClickException) -> int:
    """Tells about a wrong call in one line, and in a second one where its help is."""
    ctx = error.ctx if isinstance(error, click.UsageError) else None
    text = " ".join(error.format_message().split()).rstrip(".")  # click lists choices on lines of their own
    first = text[:1].lower() + text[1:] if text[1:2].islower() else text
    _fail(first, os.EX_USAGE)
    if ctx is not None:
        _echo(f"Try `{ctx.command_path} --help`.")
    return os.EX_USAGE


def interrupted() -> int:
    """Returns the exit code after Ctrl-C."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr.isatty():
            click.echo(err=True)  # after the terminal's ^C
    return 128 + signal.SIGINT


def _echo(text: str) -> None:
    """Prints on standard error, which may be closed or full: then there is no place left to say so."""
    try:
        click.echo(text, err=True, color=output.colours())
    except (OSError, ValueError):
        _drop_output()


def _causes(error: BaseException) -> Iterator[BaseException]:
    while (error := error.__cause__) is not None:  # type: ignore[assignment]
        yield error


# --- signals -----------------------------------------------------------------------------------------------------


class _Ended(BaseException):
    """SIGTERM or SIGHUP: ends the command through its clean-up. Not an Exception, which commands may catch."""

    def __init__(self, number: int) -> None:
        self.code = 128 + number
        super().__init__(f"signal {number}")


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A context in which SIGTERM and SIGHUP end the command through its clean-up. Signals that are ignored, as by
    nohup(1), stay so."""

    def end(number: int, _frame: FrameType | None) -> NoReturn:
        for one in mine:
            signal.signal(one, signal.SIG_IGN)  # the clean-up is not interrupted
        raise _Ended(number)

    mine: list[signal.Signals] = []
    if threading.current_thread() is threading.main_thread():
        numbers = (signal.SIGTERM, signal.SIGHUP)
        mine = [one for one in numbers if signal.getsignal(one) is signal.SIG_DFL]
    for one in mine:
        signal.signal(one, end)
    try:
        yield
    finally:
        for one in mine:
            signal.signal(one, signal.SIG_DFL)


# --- standard streams --------------------------------------------------------------------------------------------


class _Stream(io.FileIO):
    """A standard stream whose errors carry its name."""

    def __init__(self, number: int) -> None:
        super().__init__(number, "rw"[number > 0], closefd=False)
        self._stream = _STREAMS[number]

    def readinto(self, buffer: Any, /) -> int | None:
        with self._named():
            return super().readinto(buffer)

    def readall(self) -> bytes | None:  # type: ignore[override]
        with self._named():
            return super().readall()

    def write(self, data: Any, /) -> int | None:  # type: ignore[override]
        with self._named():
            return super().write(data)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            about = "it is closed" if error.errno == errno.EBADF else error.strerror
            raise OSError(error.errno, about, self._stream) from None


def _take_standard_streams() -> None:
    """Has errors of standard streams carry their names, and text that is no Unicode be printed as it came.

    A closed descriptor is opened, in the direction in which it is not used, as glibc does for programs with
    privileges: no other file gets its number, and each use of it fails.
    """
    if sys.stdout is not sys.__stdout__ or sys.stdin is not sys.__stdin__:
        return  # replaced on purpose, by a test
    for number, flags in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_RDONLY)):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, flags)  # the lowest free number, which is this one
            os.set_inheritable(opened, True)
    buffers = [io.BufferedReader(_Stream(0)), io.BufferedWriter(_Stream(1)), io.BufferedWriter(_Stream(2))]
    sys.stdin = _text(buffers[0], sys.stdin)
    sys.stdout = _text(buffers[1], sys.stdout)
    sys.stderr = _text(buffers[2], sys.stderr)


def _text(buffer: Any, before: Any) -> io.TextIOWrapper:
    encoding = "utf-8" if before is None else before.encoding
    errors = "surrogateescape" if encoding.lower() == "utf-8" else "backslashreplace"
    writing = isinstance(buffer, io.BufferedWriter)
    at_once = writing and (buffer.raw.fileno() == 2 or buffer.isatty())
    return io.TextIOWrapper(buffer, encoding, errors, line_buffering=at_once, write_through=at_once and not writing)


def _flush() -> None:
    sys.stdout.flush()


def _drop_output() -> None:
    """Discards what is buffered for streams that take no more: the interpreter would try again at its end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        for number, stream in ((1, sys.stdout), (2, sys.stderr)):
            try:
                stream.flush()
            except OSError:
                if stream.fileno() == number:
                    os.dup2(null, number)
        os.close(null)

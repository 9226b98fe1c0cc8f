"""Defines the command line options for the parameters of key modules, and reads their values."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import click

from upcall.core.errors import UsageError
from upcall.keymodule import Parameter
from upcall.keys.enrolment import check_known, chosen
from upcall.keys.passphrase import from_fd, from_file, from_terminal, wipe


class ParameterWords(NamedTuple):
    """The options as given on the command line; files and descriptors have not been read yet."""

    plain: Mapping[str, str]
    asked: frozenset[str]  # parameters to be typed on the terminal
    fds: Mapping[str, str]
    files: Mapping[str, str]


def parameter_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that adds the options; passes them to the command as one argument, `told`."""

    @functools.wraps(command)
    def with_told(param: tuple[str, ...], param_fd: tuple[str, ...], param_file: tuple[str, ...], **rest: Any) -> Any:
        plain = dict(_pair(text, "--param") for text in param if "=" in text)
        asked = frozenset(text for text in param if "=" not in text)
        fds = dict(_pair(text, "--param-fd") for text in param_fd)
        files = dict(_pair(text, "--param-file") for text in param_file)
        names = [*plain, *asked, *fds, *files]
        if len(set(names)) != len(param) + len(param_fd) + len(param_file):
            raise UsageError("a parameter was given twice")
        return command(told=ParameterWords(plain, asked, fds, files), **rest)

    for option in (_FILE, _FD, _PARAM):
        with_told = option(with_told)
    return with_told


_PARAM = click.option(
    "--param",
    multiple=True,
    metavar="NAME[=VALUE]",
    help="A parameter of the key module. Without a value, it is typed in the terminal, without echo.",
)
_FD = click.option("--param-fd", multiple=True, metavar="NAME=N", help="Read a parameter from this descriptor.")
_FILE = click.option(
    "--param-file", multiple=True, metavar="NAME=PATH", help="Read it from this file, which no other user may read."
)


def _pair(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise UsageError(f"{option} {name}: NAME=... is needed")
    return name, value


def gather(parameters: Sequence[Parameter], told: ParameterWords) -> dict[str, str]:
    """Returns the value of every parameter by name. Asks on the terminal for required secret ones that are missing,
    after all others were checked. UsageError.

    Secret values are str, which cannot be wiped: they stay in memory until the command ends.
    """
    check_known(parameters, (*told.plain, *told.asked, *told.fds, *told.files))
    if exposed := [one.name for one in parameters if one.secret and one.name in told.plain]:
        name = exposed[0]
        raise UsageError(
            f"the parameter {name!r} is a secret, which others would see on the command line: "
            f"use --param {name}, --param-fd or --param-file"
        )
    given = dict(told.plain)
    given |= {name: _text(from_fd(_number(number, name)), name) for name, number in told.fds.items()}
    given |= {name: _text(from_file(path), name) for name, path in told.files.items()}
    typed = [
        one
        for one in parameters
        if one.name in told.asked or (one.secret and one.default is None and one.name not in given)
    ]
    chosen([one for one in parameters if one not in typed], given)
    for one in typed:
        prompt = one.help.rstrip(".") or one.name
        given[one.name] = _text(from_terminal(f"{prompt}: ", other="--param-fd or --param-file"), one.name)
    return chosen(parameters, given)


def _number(text: str, name: str) -> int:
    if not text.isdecimal() or not text.isascii():
        raise UsageError(f"--param-fd {name}={text}: a descriptor's number is needed")
    return int(text)


def _text(secret: bytearray, name: str) -> str:
    try:
        return secret.decode()
    except UnicodeDecodeError:
        raise UsageError(f"the parameter {name!r} is not UTF-8") from None
    finally:
        wipe(secret)

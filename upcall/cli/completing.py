"""Completes names on <TAB>.

Each completion is a process of its own, for which a person waits. So modules are imported only when needed, plugins
are listed but not imported, and errors give no completions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import click
from click.shell_completion import CompletionItem

from upcall.core.errors import UpcallError

Offer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def _offer(found: Callable[[], Iterable[tuple[str, str]]]) -> Offer:
    """Returns a completion function. `found()`: all (word, description); those that begin with the typed text are
    offered."""

    @functools.wraps(found)
    def offer(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        try:
            return [CompletionItem(word, help=about) for word, about in found() if word.startswith(incomplete)]
        except (UpcallError, OSError):
            return []

    return offer


@_offer
def keys() -> Iterable[tuple[str, str]]:
    """Lists the user's keys by name, then by signature."""
    from upcall.keys.store import KeyStore

    store, signatures = KeyStore(), []
    for name in store.names():
        try:
            entry = store.load(name)
        except (UpcallError, OSError):
            yield name, "damaged"
        else:
            yield name, entry.description or entry.module
            signatures.append((entry.signature, name))
    yield from signatures


@_offer
def mounts() -> Iterable[tuple[str, str]]:
    """Lists the user's mounts by name."""
    from upcall.keys.mounts import MountStore

    return ((entry.name, entry.upper) for entry in MountStore().all())


@_offer
def plugins() -> Iterable[tuple[str, str]]:
    from upcall.keys import plugins as modules

    return ((plugin.alias, plugin.distribution) for plugin in modules.installed())


@_offer
def key_modules() -> Iterable[tuple[str, str]]:
    from upcall.keymodule import GROUP
    from upcall.keys import plugins as modules

    return ((plugin.alias, plugin.distribution) for plugin in modules.installed() if plugin.group == GROUP)


@_offer
def services() -> Iterable[tuple[str, str]]:
    from upcall.protocols.catalogue import SERVICES

    return ((name, "") for name in SERVICES)


@_offer
def outcomes() -> Iterable[tuple[str, str]]:
    from upcall.core.errors import REASONS

    return ((name, "") for name in ("answered", *REASONS))


@_offer
def key_types() -> Iterable[tuple[str, str]]:
    from upcall.protocols.request_key.key_types import KEY_TYPES

    return ((name, "") for name in KEY_TYPES)


@_offer
def config_names() -> Iterable[tuple[str, str]]:
    """Lists the configuration's tables and their keys."""
    from upcall.config.keys import TABLES
    from upcall.config.table import ANY

    for table in TABLES:
        if ANY not in table.name:
            name = table.name.replace('"', "")  # the shell would remove quotes
            yield name, table.about
            yield from ((f"{name}.{key.name}", key.about) for key in table.keys)


@_offer
def sinks() -> Iterable[tuple[str, str]]:
    try:
        from upcall_quota import sinks as installed
    except ImportError:
        return ()
    return ((name, "") for name in sorted(installed.known()))


@_offer
def users() -> Iterable[tuple[str, str]]:
    import pwd

    return ((user.pw_name, "") for user in pwd.getpwall())


@_offer
def groups() -> Iterable[tuple[str, str]]:
    import grp

    return ((group.gr_name, "") for group in grp.getgrall())


@_offer
def manual_pages() -> Iterable[tuple[str, str]]:
    """Lists the pages of commands, which are used most."""
    from upcall.cli import COMMANDS

    return ((name, about) for name, (_, about) in COMMANDS.items())

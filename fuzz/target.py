"""Loads targets: modules in fuzz.targets with SEEDS and run(), whose docstrings state the invariants."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from upcall.core.errors import PeerError

T = TypeVar("T")

HERE: Final = Path(__file__).parent
CORPUS: Final = HERE / "corpus"
MOST: Final = 16384  # bytes: default limit of an input


class Target(NamedTuple):
    """A target. `run` raises if and only if an invariant is violated."""

    name: str
    run: Callable[[bytes], None]
    seeds: Sequence[bytes]
    most: int  # bytes: limit of an input
    memory: int  # bytes: limit of peak memory for one input, plus as much for each 64 bytes of it

    @property
    def corpus(self) -> Path:
        return CORPUS / self.name

    def inputs(self) -> list[bytes]:
        """Returns the seeds, and the corpus in the repository."""
        found = sorted(self.corpus.iterdir()) if self.corpus.is_dir() else []
        return [*self.seeds, *(path.read_bytes() for path in found)]


def names() -> list[str]:
    return sorted(path.stem for path in (HERE / "targets").glob("[!_]*.py"))


def load(name: str) -> Target:
    module = importlib.import_module(f"fuzz.targets.{name}")
    most, memory = getattr(module, "MOST", MOST), getattr(module, "MEMORY", 1 << 20)
    return Target(name, module.run, module.SEEDS, most, memory)


def taken(take: Callable[..., T], *arguments: object, refuse: tuple[type[Exception], ...] = (PeerError,)) -> T | None:
    """Returns the result of a decoder; None if it raises one of its documented errors, `refuse`."""
    try:
        return take(*arguments)
    except refuse:
        return None


def same(found: object, wanted: object) -> None:
    if found != wanted:
        raise AssertionError(f"{found!r} is not {wanted!r}")


def holds(true: bool, what: str) -> None:
    if not true:
        raise AssertionError(what)

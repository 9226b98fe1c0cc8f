"""What a target is made of: a module in fuzz.targets with SEEDS and run(), whose docstring states its invariants."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from upcall.core.errors import PeerError

T = TypeVar("T")

HERE: Final = Path(__file__).parent
CORPUS: Final = HERE / "corpus"
MOST: Final = 16384  # bytes of an input, where a target does not say otherwise


class Target(NamedTuple):
    """`run` raises on a broken invariant, and on nothing else."""

    name: str
    run: Callable[[bytes], None]
    seeds: Sequence[bytes]
    most: int  # bytes of an input
    memory: int  # bytes that one input may cost at the peak, and as many again for each 64 bytes of it

    @property
    def corpus(self) -> Path:
        return CORPUS / self.name

    def inputs(self) -> list[bytes]:
        """The seeds, and the corpus in the repository."""
        found = sorted(self.corpus.iterdir()) if self.corpus.is_dir() else []
        return [*self.seeds, *(path.read_bytes() for path in found)]


def names() -> list[str]:
    return sorted(path.stem for path in (HERE / "targets").glob("[!_]*.py"))


def load(name: str) -> Target:
    module = importlib.import_module(f"fuzz.targets.{name}")
    most, memory = getattr(module, "MOST", MOST), getattr(module, "MEMORY", 1 << 20)
    return Target(name, module.run, module.SEEDS, most, memory)


def taken(take: Callable[..., T], *arguments: object, refuse: tuple[type[Exception], ...] = (PeerError,)) -> T | None:
    """What a decoder makes of it; None if it raises one of the errors that it documents."""
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

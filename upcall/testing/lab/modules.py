"""Which kernel modules must be loaded before which, read from a kernel's modules.dep."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath


def module_name(path: str) -> str:
    """`kernel/fs/9p/9p.ko.xz` is the module `9p`; the kernel takes - and _ for the same letter."""
    return PurePosixPath(path).name.split(".ko")[0].replace("-", "_")


def parse_dependencies(modules_dep: str) -> dict[str, list[str]]:
    """The text of modules.dep as {path: the paths it needs}, paths relative to the kernel's module folder."""
    needs: dict[str, list[str]] = {}
    for line in modules_dep.splitlines():
        path, colon, rest = line.partition(":")
        if colon:
            needs[path.strip()] = rest.split()
    return needs


def load_order(modules_dep: str, wanted: Iterable[str]) -> list[str]:
    """The paths to load, each after all it needs, so that every name in `wanted` is loaded at the end.

    Raises KeyError with the name of a module that modules.dep does not list, and ValueError for a circle.
    The order that depmod writes is not relied on: kmod and busybox disagree about it."""
    needs = parse_dependencies(modules_dep)
    paths = {module_name(path): path for path in needs}
    order: list[str] = []

    def visit(path: str, above: tuple[str, ...]) -> None:
        if path in above:
            raise ValueError(f"{path} needs itself")
        if path in order:
            return
        for needed in needs[path]:
            visit(needed, (*above, path))
        order.append(path)

    for name in wanted:
        visit(paths[name.replace("-", "_")], ())
    return order

"""Determines the order in which to load kernel modules, from a kernel's modules.dep."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath


def module_name(path: str) -> str:
    """Returns the name of a module: `kernel/fs/9p/9p.ko.xz` is `9p`. `-` becomes `_`, which the kernel treats as
    equal."""
    return PurePosixPath(path).name.split(".ko")[0].replace("-", "_")


def parse_dependencies(modules_dep: str) -> dict[str, list[str]]:
    """Parses modules.dep. Returns path -> paths that it needs, relative to the kernel's module folder."""
    needs: dict[str, list[str]] = {}
    for line in modules_dep.splitlines():
        path, colon, rest = line.partition(":")
        if colon:
            needs[path.strip()] = rest.split()
    return needs


def load_order(modules_dep: str, wanted: Iterable[str]) -> list[str]:
    """Returns the paths to load for the modules `wanted`, each after the ones that it needs.

    KeyError with a module's name if modules.dep does not list it; ValueError if dependencies are circular. Does not
    rely on the order of modules.dep, which differs between kmod and busybox."""
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

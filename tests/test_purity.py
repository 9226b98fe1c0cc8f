"""The pure modules import nothing that does I/O, directly or through each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PURE = ["keymodule", "handler", "config.lines", "daemon.isolation.breaker"]
PURE += [f"{of}.{path.stem}" for of in ("core", "wire") for path in sorted((ROOT / "upcall" / of).glob("[!_]*.py"))]
_OF_PROTOCOLS = {
    "ecryptfs": ("authtok", "header", "locks", "packets"),
    "quota": ("backlog", "coalescing", "notice", "policy", "rate_limit", "scan", "settings", "state", "warning"),
    "request_key": ("cifs_spnego", "conf", "dns_resolver", "key_type", "key_types", "messages", "origin_check"),
}
PURE += [f"protocols.{of}.{name}" for of, names in _OF_PROTOCOLS.items() for name in names]
HARMLESS = {"__future__", "collections", "enum", "errno", "itertools", "math", "re", "struct", "typing"}
HARMLESS |= {"ast", "bisect", "contextlib", "datetime", "heapq", "json"}
# A random number to start counting from; a type that stands in signatures.
ALLOWED = {("upcall.core.router", "secrets"), ("upcall.keymodule", "pathlib")}


def imports(module: str) -> Iterator[str]:
    path = ROOT / module.replace(".", "/")
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(source.read_text())
    # The package itself hands its names out when they are asked for: what runs on import is its top level only.
    for node in tree.body if module == "upcall" else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{module}: a relative import"
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name for name in below if (ROOT / name.replace(".", "/")).with_suffix(".py").exists()]
            yield from names or [node.module]


@pytest.mark.parametrize("module", [f"upcall.{name}" for name in PURE])
def test_pure(module: str) -> None:
    seen, left = {module}, [module]
    while left:
        importer = left.pop()
        for name in imports(importer):
            if name.split(".")[0] == "upcall":
                new = {name, name.rpartition(".")[0]} - seen - {"upcall"}  # which imports its public names when used
                seen |= new
                left += new
            elif name.split(".")[0] not in HARMLESS and (importer, name) not in ALLOWED:
                pytest.fail(f"{importer} imports {name}")

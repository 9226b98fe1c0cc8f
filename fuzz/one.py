"""Runs one target in this process: `python -m fuzz.one TARGET INPUT...` runs inputs; `--seconds N CORPUS FINDINGS`
fuzzes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fuzz.target import HERE, load

UNAVAILABLE = os.EX_UNAVAILABLE
_PLUGINS = sorted(path.name for path in HERE.parent.glob("plugins/*/upcall_*"))
INSTRUMENTED = ["upcall", *_PLUGINS, "fuzz.router", "tomllib", "json.decoder"]
TIME_LIMIT = 10  # seconds for one input; most take less than a millisecond
MEMORY_LIMIT = 1024  # MiB of the whole process


def explore(name: str, seconds: int, corpus: Path, findings: Path) -> int:
    """Fuzzes a target; adds inputs to `corpus`. libFuzzer ends the process: with 0, or 77 after a finding."""
    try:
        import atheris
    except ImportError:
        print(f"{name}: there is no atheris for this Python and machine (requirements/fuzz.txt)")
        return UNAVAILABLE
    with atheris.instrument_imports(include=INSTRUMENTED, enable_loader_override=False):
        target = load(name)
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    words = [
        f"fuzz.one {name}", f"-max_total_time={seconds}", f"-max_len={target.most}", f"-timeout={TIME_LIMIT}",
        f"-rss_limit_mb={MEMORY_LIMIT}", f"-artifact_prefix={findings}/{name}-", "-print_final_stats=1", str(corpus),
    ]  # fmt: skip
    if target.corpus.is_dir():
        words.append(str(target.corpus))
    atheris.Setup(words, target.run)
    atheris.Fuzz()
    return os.EX_OK


def main(arguments: list[str]) -> int:
    name, *rest = arguments
    if rest[:1] == ["--seconds"]:
        return explore(name, int(rest[1]), Path(rest[2]), Path(rest[3]))
    target = load(name)
    for path in rest:
        target.run(Path(path).read_bytes())
        print(f"{name}: {path}: nothing is wrong")
    return os.EX_OK


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    sys.exit(main(sys.argv[1:]))

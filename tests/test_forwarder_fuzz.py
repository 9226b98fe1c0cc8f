"""libFuzzer, where there is clang, on the forwarder's checks of the broker's answer; for a few seconds.

For longer: `UPCALL_FUZZ_SECONDS=600 pytest -s tests/test_forwarder_fuzz.py`. The mutants of
tests/test_forwarder_decide.py need no clang.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.forwarder.scene import HERE, SOURCES, answered, refused, spnego
from upcall.protocols.request_key.forwarder import build

FLAGS = ["-std=c11", "-g", "-O1", "-Werror", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"]
LIMIT = 33_000  # bytes of an input: more than the largest message
HEAD = 28  # bytes of a message before its body
WHOLE, SPNEGO, DNS = 4, 0, 1  # the first byte of an input: fuzz.c
SEEDS = {
    SPNEGO: [spnego(), spnego(64, 80)],
    DNS: [b"192.0.2.1,2001:db8::1#dnserror=3\0"],
}


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    clang = shutil.which("clang")
    if clang is None:
        pytest.skip("there is no clang")
    program = tmp_path_factory.mktemp("fuzzer") / "fuzzer"
    sources = [str(SOURCES / "decide.c"), str(HERE / "fuzz.c")]
    command = [clang, *build.WARNINGS, *FLAGS, f"-I{SOURCES}", "-o", str(program), *sources]
    done = subprocess.run(command, capture_output=True, text=True, timeout=build.TIME_LIMIT)
    if "libclang_rt" in done.stderr:
        pytest.skip("there is no libFuzzer (libclang-rt-dev)")
    assert done.returncode == 0, done.stderr
    return program


def test_libfuzzer_finds_no_payload_that_violates_the_forwarders_checks(fuzzer: Path, tmp_path: Path) -> None:
    corpus, seeds, found = (tmp_path / name for name in ("corpus", "seeds", "found"))
    for folder in (corpus, seeds, found):
        folder.mkdir()
    for kind, payloads in SEEDS.items():
        for number, payload in enumerate(payloads):
            message = answered(payload, 7)
            (seeds / f"{kind}-{number}").write_bytes(bytes([kind]) + message[HEAD:])
            (seeds / f"{kind}-{number}-whole").write_bytes(bytes([kind | WHOLE]) + message)
    (seeds / "refusal").write_bytes(bytes([WHOLE]) + refused(126))
    seconds = os.environ.get("UPCALL_FUZZ_SECONDS", "")
    how_long = [f"-max_total_time={seconds}"] if seconds else ["-runs=200000", "-seed=1"]
    words = [str(fuzzer), f"-max_len={LIMIT}", *how_long, f"-artifact_prefix={found}/", "-print_final_stats=1"]
    done = subprocess.run(
        [*words, str(corpus), str(seeds)], capture_output=True, text=True, timeout=int(seconds or 0) + 300
    )
    print("\n".join(line for line in done.stderr.splitlines() if line.startswith("stat::")))
    assert done.returncode == 0, done.stderr[-4000:]
    assert not any(found.iterdir())

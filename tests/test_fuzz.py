"""The whole corpus of the fuzzer, by plain pytest: every decoder keeps its invariants, in bounded steps and memory.

Looking for more needs atheris: `make fuzz`. docs/fuzzing.md.
"""

from __future__ import annotations

import ast
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from fuzz.__main__ import LARGEST, Done, _fast_enough, _move
from fuzz.target import CORPUS, HERE, Target, load, names
from upcall.protocols.request_key.key_types import KEY_TYPES

ROOT = HERE.parent
STEPS, STEPS_PER_BYTE = 60_000, 400  # lines of Python that one input may cost
CHANGED = 20  # changed copies of each input


@pytest.fixture(params=names())
def target(request: pytest.FixtureRequest) -> Target:
    name: str = request.param
    return load(name)


def test_every_input_of_the_corpus_keeps_the_invariants(target: Target) -> None:
    for data in target.inputs():
        target.run(data)


def test_slightly_changed_inputs_keep_the_invariants(target: Target) -> None:
    """The changes are the same each time; `make fuzz` looks further, guided by coverage."""
    chance = random.Random(target.name)
    for data in target.inputs():
        for _ in range(CHANGED):
            target.run(changed(data, chance)[: target.most])


def changed(data: bytes, chance: random.Random) -> bytes:
    buffer = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(buffer) + 1)
        match chance.randrange(5):
            case 0 if at < len(buffer):
                buffer[at] ^= 1 << chance.randrange(8)
            case 1 if at < len(buffer):
                buffer[at] = chance.choice(b"\x00\xff\x7f\x80\n;=\"'[")
            case 2:
                del buffer[at:]
            case 3:
                buffer[at:at] = buffer[: chance.randrange(64)]
            case _:
                buffer[at:at] = chance.randbytes(chance.randrange(4))
    return bytes(buffer)


def test_steps_and_memory_are_bounded_by_the_size(target: Target) -> None:
    """Lines are counted, not timed. Inputs: the corpus, and each seed repeated up to the longest length allowed."""
    inputs = target.inputs()
    for data in inputs:
        target.run(data)  # what is imported or cached once counts for nobody
    grown = [(data * (target.most // len(data)))[: target.most] for data in target.seeds if data]
    for data in [*inputs, *grown]:
        allowed = STEPS + STEPS_PER_BYTE * len(data)
        steps = steps_of(target, data, allowed)
        assert steps <= allowed, f"{target.name}: more than {allowed} lines for {len(data)} bytes: {data[:64]!r}"
    for data in [max(inputs, key=len), *grown]:
        tracemalloc.start()
        try:
            target.run(data)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        allowed = target.memory + target.memory // 64 * len(data)
        assert peak <= allowed, f"{target.name}: {peak} bytes of memory for {len(data)}: {data[:64]!r}"


class TooMany(BaseException):
    """More lines were run than are allowed."""


def steps_of(target: Target, data: bytes, allowed: int) -> int:
    steps = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        steps += event == "line"
        if steps > allowed:
            raise TooMany
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        target.run(data)
    except TooMany:
        pass
    finally:
        sys.settrace(before)
    return steps


def test_every_target_states_its_invariants_and_has_inputs(target: Target) -> None:
    module = sys.modules[f"fuzz.targets.{target.name}"]
    assert module.__doc__ is not None
    assert len(module.__doc__.strip().splitlines()) >= 1
    assert target.seeds
    assert all(len(data) <= target.most for data in target.inputs())


def imported() -> set[str]:
    """The modules, and the names in them, that targets import."""
    found: set[str] = set()
    for name in names():
        for node in ast.walk(ast.parse((HERE / "targets" / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


# Decoders outside of upcall/wire, as they were found by looking for what parses, unpacks and reads /proc.
ELSEWHERE = [
    "upcall.broker.daemon_link",
    "upcall.broker.source_listener",
    "upcall.process.listener",
    "upcall.process.settings",
    "upcall.broker.registration",
    "upcall.protocols.ecryptfs.authtok",
    "upcall.protocols.ecryptfs.header",
    "upcall.protocols.ecryptfs.packets",
    "upcall.protocols.local.source",
    "upcall.protocols.quota.coalescing",
    "upcall.protocols.quota.notice",
    "upcall.protocols.quota.state",
    "upcall.protocols.quota.warning",
    "upcall.protocols.request_key.conf",
    "upcall.protocols.request_key.messages",
    "upcall.cli.log",
    "upcall.config.layers",
    "upcall.config.lines",
    "upcall.daemon.control",
    "upcall.protocols.request_key.forwarder.standin",
    "upcall.protocols.request_key.origin_check",
    "upcall.kernel.ancestry",
    "upcall.kernel.genetlink",
    "upcall.kernel.mounts",
    "upcall.kernel.procfs",
    "upcall.protocols.request_key.origin",
    "upcall.keys.pem",
    "upcall.keys.store",
    "upcall.daemon.prompting.agent",
    "upcall.daemon.prompting.pinentry",
    "upcall.daemon.prompting.requester",
    "upcall.daemon.prompting.systemd",
    "upcall.protocols.request_key.install.our_file",
    "upcall.install.sessions.records",
    "upcall.install.manifest",
    "upcall_dns.hosts",
    "upcall_dns.names",
    "upcall_dns.servers",
    "upcall_quota.terminal",
    "upcall_quota.words",
]


def test_every_decoder_has_a_target() -> None:
    wire = [f"upcall.wire.{path.stem}" for path in (ROOT / "upcall" / "wire").glob("[!_]*.py")]
    pure = ("blob", "keyfile", "negtoken", "sealed", "uri")
    plugins = [f"{path.parent.name}.{path.stem}" for path in ROOT.glob("plugins/*/upcall_*/*.py") if path.stem in pure]
    assert len(wire) > 3
    assert len(plugins) > 7
    types = [key_type.check_answer.__module__ for key_type in KEY_TYPES.values()]
    assert {*wire, *plugins, *types, *ELSEWHERE} <= imported()


def test_the_corpus_stays_small() -> None:
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} <= {*names()}, "a corpus without a target"
    assert sum(path.stat().st_size for path in files) < 400_000
    assert all(path.stat().st_size <= 16 * LARGEST for path in files)


def test_a_finding_is_kept_with_the_command_that_shows_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fuzz.__main__.FINDINGS", HERE / "findings")
    (tmp_path / "netlink-crash-0000test").write_bytes(b"x")
    (moved,) = _move("netlink", tmp_path, "what was said")
    try:
        text = moved.with_suffix(".txt").read_text()
        command, _, said = text.partition("\n\n")
        assert said.strip() == "what was said"
        done = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.stdout.strip().endswith("nothing is wrong")
    finally:
        moved.with_suffix(".txt").unlink()
        moved.unlink()


def test_the_fuzzer_without_atheris_exits_with_a_plain_error(tmp_path: Path) -> None:
    program = "import sys; sys.modules['atheris'] = None; from fuzz.one import main; sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", program, "netlink", "--seconds", "1", str(tmp_path), str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (
        69,
        "netlink: there is no atheris for this Python and machine (requirements/fuzz.txt)\n",
    )
    assert Done("netlink", 69, 0, "", ()).code == 69


def test_an_input_that_a_busy_machine_stopped_is_no_finding(tmp_path: Path) -> None:
    (tmp_path / "config-timeout-0").write_bytes(b"[broker]\n")
    assert _fast_enough("config", tmp_path / "config-timeout-0")
    assert not _fast_enough("config", tmp_path / "not there")

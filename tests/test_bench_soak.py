"""The soak test: its verdicts, and a short run from end to end."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from bench.soak import plot
from bench.soak.samples import Growth, Sample, growth, sample, write

ROOT = Path(__file__).parent.parent


def taken(each_second: float, noise: float = 0.2, warming: float = 5.0) -> list[Sample]:
    """Ten minutes of a process that grows by so many MB a second, after its warm-up."""
    chance = random.Random(7)
    return [
        Sample(
            at, "daemon", 20 + min(warming, at / 10) + at * each_second + chance.uniform(-noise, noise), 9, 8, 12, 5
        )
        for at in range(600)
    ]


def of(found: list[Growth], figure: str) -> Growth:
    return next(one for one in found if one.bound.figure == figure)


def test_noise_and_warm_up_are_judged_flat() -> None:
    found = growth(taken(0))
    assert all(one.flat for one in found)
    assert abs(of(found, "rss").added) < 0.1
    assert of(found, "descriptors").middle == 12


def test_a_leak_is_found_through_the_noise() -> None:
    """3 bytes for each of a million requests."""
    rss = of(growth(taken(3 / 600)), "rss")
    assert not rss.flat
    assert rss.added == pytest.approx(2.4, abs=0.2)  # after the warm-up
    assert rss.per_hour == pytest.approx(18, abs=1.5)


def test_memory_that_shrinks_is_judged_flat() -> None:
    assert of(growth(taken(-3 / 600)), "rss").flat


def test_a_sample_of_this_process_has_plausible_figures_and_a_line_of_csv(tmp_path: Path) -> None:
    found = sample(1.5, "us", os.getpid())
    assert 5 < found.private <= found.pss <= found.rss < 1000
    assert found.descriptors == len(os.listdir("/proc/self/fd"))
    assert found.threads >= 1
    with pytest.raises(OSError, match="No such"):
        sample(1.5, "nobody", 1 << 30)
    write(tmp_path / "samples.csv", [found])
    head, line = (tmp_path / "samples.csv").read_text().splitlines()
    assert head == "at,who,rss,pss,private,descriptors,threads"
    assert line.startswith("1.5,us,")


@pytest.mark.parametrize("most", [0.0, 0.4, 7.0, 33.0, 9000.0])
def test_a_plot_is_drawn_within_its_frame(most: float) -> None:
    panels = [plot.Panel("a < b", {"x & y": [(0.0, 0.0), (300.0, most), (600.0, most / 2)]})]
    drawn = ET.fromstring(plot.svg("title", panels))
    (line,) = drawn.iter("{http://www.w3.org/2000/svg}polyline")
    height, width = float(drawn.get("height", "0")), float(drawn.get("width", "0"))
    for point in line.get("points", "").split():
        x, y = map(float, point.split(","))
        assert 0 < x < width
        assert 0 < y < height


@pytest.mark.skipif(shutil.which("cc") is None, reason="the clients are written in C")
def test_a_short_soak_run_loses_no_request(tmp_path: Path) -> None:
    """Whether memory stays flat cannot be judged after so short a run."""
    command = [sys.executable, "-m", "bench.soak", "--minutes", "0.1", "--out", str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode in (0, 1), ran.stdout + ran.stderr
    last = ran.stdout.splitlines()[-1]
    assert all(words.endswith(" grows") for words in last.split("; ")) or last.startswith("flat"), ran.stdout
    counts = json.loads((tmp_path / "soak.json").read_text())["counts"]
    for kind in ("files", "keys", "visitors"):
        assert counts[kind]["answered"] > 10
    assert (tmp_path / "soak.svg").read_text().count("<polyline") >= 7

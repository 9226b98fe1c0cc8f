"""`python -m bench.soak [--minutes 10]`: makes as many requests in ten minutes as the kernel can make in an hour.

HOUR is the limit of the kernel's path. Exit status: 0 if no request was lost and no resource has grown, 1 otherwise, 2
if the run failed.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from bench.rows import machine
from bench.soak import plot, samples
from bench.soak.samples import Growth, Sample
from bench.soak.scene import Scene
from bench.stage import BenchError, Stage

# Files that eight processes create on the real kernel, per second (`python -m bench --only files`), for an hour.
RATE = 412
HOUR = RATE * 3600
_EVERY = 1.0  # seconds between two samples
_SAYS = 30  # seconds between two lines of progress without a terminal


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long  [default: 10]")
    parser.add_argument("--out", type=Path, default=Path("build/soak"), metavar="FOLDER", help="for figures and plot")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # runs the clean-up of the stage
    try:
        with Stage() as stage:
            stage.compile()
            return _soak(stage, options.minutes * 60, options.out)
    except BenchError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 2


def _soak(stage: Stage, seconds: float, out: Path) -> int:
    scene = Scene(stage, seconds)
    pids = scene.open()
    begun = time.monotonic()
    taken: list[Sample] = []
    rates: list[tuple[float, float]] = []
    before, last = 0, begun
    told = Progress(seconds)
    try:
        while (now := time.monotonic()) - begun < seconds:
            try:
                taken += [samples.sample(now - begun, who, pid) for who, pid in pids.items()]
            except OSError as error:
                raise BenchError(f"somebody has ended: {error}") from error
            settled = _total(scene)["answered"]
            rates.append((now - begun, (settled - before) / max(now - last, 0.1)))
            before, last = settled, now
            told(now - begun, settled, taken[-len(pids) :])
            time.sleep(max(0.0, _EVERY - (time.monotonic() - now)))
    finally:
        told.close()
    scene.wait()
    grown = samples.growth(taken)
    out.mkdir(parents=True, exist_ok=True)
    samples.write(out / "samples.csv", taken)
    (out / "soak.svg").write_text(_plot(taken, rates[1:], seconds), "utf-8")
    found = {"machine": machine(), "seconds": seconds, "counts": scene.counts, "status": scene.status()}
    (out / "soak.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    return _verdict(scene, grown, seconds)


def _total(scene: Scene) -> Counter[str]:
    return sum(tuple(scene.counts.values()), Counter())


class Progress:
    """Shows progress: a line that is overwritten on a terminal; elsewhere a line every _SAYS seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._said = seconds, -float(_SAYS)
        self._live = None
        if sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(refresh_per_second=2)
            self._live.start()

    def __call__(self, at: float, answered: int, latest: list[Sample]) -> None:
        held = "   ".join(f"{one.who} {one.rss:.1f} MB, {one.descriptors} fds" for one in latest)
        line = f"{at:4.0f} of {self._seconds:.0f} s   {answered:,} answered   {held}"
        if self._live is not None:
            self._live.update(line)
        elif at - self._said >= _SAYS:
            self._said = at
            print(line, flush=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()


def _verdict(scene: Scene, grown: list[Growth], seconds: float) -> int:
    total = _total(scene)
    print(f"\n{'':28}{'sent':>12}{'answered':>12}{'refused':>10}{'left':>8}{'lost':>6}{'twice':>7}{'wrong':>7}")
    for name, counts in {**scene.counts, "all": total}.items():
        if counts["sent"]:
            figures = (counts[key] for key in ("sent", "answered", "refused", "left", "lost", "twice", "wrong"))
            print(f"{name:28}" + "".join(f"{one:>{width},}" for one, width in zip(figures, _WIDTHS, strict=True)))
    told = {key: total[key] for key in ("warnings", "junk", "reloads", "daemons", "killed", "stopped") if total[key]}
    print("meanwhile: " + ", ".join(f"{count:,} {key}" for key, count in told.items()))
    share = total["answered"] / HOUR
    print(f"an hour's worth at {RATE} a second: {HOUR:,}; answered in {seconds / 60:g} min: {share:.2f} times as many")
    print(f"\n{'after the warm-up':28}{'':14}{'middle':>10}{'added':>9}{'per hour':>10}   at most")
    for one in grown:
        verdict = "" if one.flat else "  GROWS"
        figure = f"{one.bound.figure} {one.bound.unit}".strip()
        print(
            f"{one.who:28}{figure:14}{one.middle:10.1f}{one.added:+9.2f}{one.per_hour:+10.1f}   "
            f"{one.bound.most:g}{verdict}"
        )
    unanswered = total["lost"] + total["twice"] + total["wrong"]
    ends = total["answered"] + total["refused"] + total["left"] + total["lost"]
    failures = [scene.failed] if scene.failed else []
    failures += [f"{unanswered} were lost, answered twice or wrong"] if unanswered else []
    failures += [f"{total['sent']} were sent, {ends} have ended"] if ends != total["sent"] else []
    failures += [f"{one.who}: {one.bound.figure} grows" for one in grown if not one.flat]
    failures += [
        f"{counts['refused']} of {name} were refused"
        for name, counts in scene.counts.items()
        if counts["refused"] and name not in scene.may_refuse
    ]
    print("\n" + ("; ".join(failures) if failures else "flat, and every request has ended once"))
    return 1 if failures else 0


_WIDTHS = (12, 12, 10, 8, 6, 7, 7)


def _plot(taken: list[Sample], rates: list[tuple[float, float]], seconds: float) -> str:
    names = list(dict.fromkeys(one.who for one in taken))

    def lines(figure: str) -> dict[str, list[tuple[float, float]]]:
        return {who: [(one.at, float(getattr(one, figure))) for one in taken if one.who == who] for who in names}

    smooth = [(rates[at][0], sum(rate for _, rate in rates[at : at + 5]) / 5) for at in range(0, len(rates) - 4, 5)]
    panels = [
        plot.Panel("resident memory, MB", lines("rss")),
        plot.Panel("descriptors", lines("descriptors")),
        plot.Panel("requests answered per second", {"all": smooth}),
    ]
    return plot.svg(f"A soak of {seconds / 60:g} minutes", panels)


if __name__ == "__main__":
    sys.exit(main())

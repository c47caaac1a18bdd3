"""What it costs that a replay is the forward again: settings, state, bitwise comparison.

``python benchmarks/replay.py [--rounds N] [--quick] [--csv FILE]``

* options: a segment's share of a step (50 in a row, forward and backward) with everything on,
  without the ambient state (``ambient="ignore"``), without what the function reaches
  (``preserve_state=False``), and without both; what each adds to the last. For an operator, a
  module without buffers, one with.
* bitwise: bytes a second of the fingerprint beside those of ``copy_`` (which is ``memcpy``, and
  reads and writes), on one thread and on all, for a large tensor; nanoseconds for a small one.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import _C
from ..checkpoint import Checkpointer
from ._command import Command, Options, Report
from ._common import Screen, Summary, Table, calibrate, cores, interleave, torch_threads

COLUMNS = ("measurement", "program", "variant", "statistic", "value", "unit")
COMMAND = Command(
    "replay",
    "Cost of the ambient state, of buffers and versions, and of the bitwise comparison.",
    target_s=0.08,
    draws=False,
)

SEGMENTS = 50  # in a row in a step, so that a step is mostly segments
OPTIONS: dict[str, dict[str, Any]] = {
    "neither": {"ambient": "ignore", "preserve_state": False},
    "ambient state": {"preserve_state": False},
    "reached state": {"ambient": "ignore"},
    "both": {},
}


def programs() -> dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]]:
    return {
        "tanh": (torch.tanh, (4, 4)),
        "Linear, Tanh": (nn.Sequential(nn.Linear(4, 4), nn.Tanh()), (4, 4)),
        "Linear, BatchNorm": (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), (4, 4)),
    }


def added_by_options(
    screen: Screen, options: Options
) -> dict[str, dict[str, tuple[Summary, Summary]]]:
    """By program and variant: a step, and what it takes longer than without both, in seconds."""
    found: dict[str, dict[str, tuple[Summary, Summary]]] = {}
    with screen.progress("options", options.rounds * len(programs())) as bar:
        for program, (function, shape) in programs().items():
            value = torch.randn(shape, requires_grad=True)

            def step(run: Checkpointer, f: Any, x: Tensor) -> None:
                for _ in range(SEGMENTS):
                    x = run(f, x)
                torch.autograd.backward(x.sum())

            thunks = {
                name: partial(step, Checkpointer(**given), function, value)
                for name, given in OPTIONS.items()
            }
            times = interleave(
                thunks,
                rounds=options.rounds,
                inner=calibrate(thunks["neither"], options.target_s),
                after_round=lambda p=program: bar.step(p),  # type: ignore[misc]
            )
            base = times["neither"]
            found[program] = {
                name: (
                    Summary(min(series) / SEGMENTS, statistics.median(series) / SEGMENTS),
                    Summary(
                        (min(series) - min(base)) / SEGMENTS,
                        statistics.median(a - b for a, b in zip(series, base, strict=True))
                        / SEGMENTS,
                    ),
                )
                for name, series in times.items()
            }
    return found


def bandwidths(screen: Screen, options: Options) -> dict[tuple[str, str], Summary]:
    """By what is done and on how many threads; gigabytes a second, nanoseconds for "64 floats"."""
    large = torch.randn((1 << 16) if options.quick else (1 << 24))
    target, small = torch.empty_like(large), torch.randn(64)
    found: dict[tuple[str, str], Summary] = {}
    rounds = min(options.rounds, 15)
    counts = sorted({1, cores()})
    with screen.progress("bitwise", rounds * (len(counts) + 1)) as bar:
        for threads in counts:
            with torch_threads(threads):
                times = interleave(
                    {
                        "fingerprint": lambda: _C.fingerprint(large),
                        "copy_": lambda: target.copy_(large),
                    },
                    rounds=rounds,
                    inner=2,
                    after_round=lambda: bar.step("large"),
                )
            for name, series in times.items():
                rates = [large.nbytes / taken / 1e9 for taken in series]
                found[name, f"{threads} thread(s)"] = Summary(max(rates), statistics.median(rates))
        times = interleave(
            {"fingerprint": lambda: _C.fingerprint(small)},
            rounds=rounds,
            inner=1000,
            after_round=lambda: bar.step("small"),
        )
        found["fingerprint", "64 floats"] = Summary.of([t * 1e9 for t in times["fingerprint"]])
    return found


def run(screen: Screen, options: Options) -> Report:
    steps = added_by_options(screen, options)
    rates = bandwidths(screen, options)
    lines: list[Sequence[object]] = []
    cost = Table(
        "Microseconds that one segment takes longer, forward and replay (min / median)",
        ("", "share of a step without both", *(name for name in OPTIONS if name != "neither")),
    )
    for program, variants in steps.items():
        cells = [f"{variants['neither'][0].min * 1e6:.1f}"]
        for name, (step, added) in variants.items():
            for statistic in ("min", "median"):
                lines.append(
                    ["step", program, name, statistic, getattr(step, statistic) * 1e6, "us"]
                )
                lines.append(
                    ["added", program, name, statistic, getattr(added, statistic) * 1e6, "us"]
                )
            if name != "neither":
                cells.append(f"{added.min * 1e6:.2f} / {added.median * 1e6:.2f}")
        cost.add(program, *cells)
    speed = Table(
        "Bitwise comparison: GB/s of 64 MiB of float32 (best / median)",
        ("", "fingerprint", "copy_", "ratio of the medians"),
        caption=f"A tensor of 64 floats: {rates['fingerprint', '64 floats'].median:.0f} ns.",
    )
    failures = []
    for name, where in rates:
        for statistic in ("min", "median"):
            unit = "ns" if where == "64 floats" else "GB/s"
            kind = "best" if statistic == "min" else statistic
            lines.append(
                ["bitwise", where, name, kind, getattr(rates[name, where], statistic), unit]
            )
        if name == "fingerprint" and where != "64 floats":
            ours, theirs = rates[name, where], rates["copy_", where]
            ratio = ours.median / theirs.median
            speed.add(
                where,
                f"{ours.min:.1f} / {ours.median:.1f}",
                f"{theirs.min:.1f} / {theirs.median:.1f}",
                f"{ratio:.2f}",
            )
            if ratio < 0.5 and not options.quick:
                failures.append(f"{where}: less than half of copy_'s bandwidth")
    return Report([cost, speed], COLUMNS, lines, failures=failures)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; see ``Command.run`` for the exit status."""
    return COMMAND.run(argv, run)

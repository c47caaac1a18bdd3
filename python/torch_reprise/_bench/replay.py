"""What it costs that a replay is the forward again: settings, state, watching, bitwise comparison.

``python benchmarks/replay.py [--rounds N] [--quick] [--csv FILE]``

* options: a segment's share of a step (50 in a row, forward and backward) with everything on,
  without the ambient state (``ambient="ignore"``), without what the function reaches
  (``preserve_state=False``), and without both; what each adds to the last. For an operator, a
  module without buffers, one with.
* watching: what a recording, the bitwise comparison and ``debug=True`` add to such a share while
  they are on. "off again" is the same step as "off", timed between the others in every round: what
  stays of them when they are off, and how much noise is in the figures.
* bitwise: bytes a second of the fingerprint beside those of ``copy_`` (which is ``memcpy``, and
  reads and writes), on one thread and on all, for a large tensor; nanoseconds for a small one.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import _C, ledger
from ..checkpoint import Checkpointer
from ._command import Command, Options, Report
from ._common import (
    Screen,
    Summary,
    Table,
    Thunk,
    calibrate,
    cores,
    interleave,
    nothing,
    torch_threads,
)
from ._programs import STATISTICS, matmul_tanh

COLUMNS = ("measurement", "program", "variant", "statistic", "value", "unit")
COMMAND = Command(
    "replay",
    "Cost of the ambient state, of buffers and versions, of recordings, debug and comparisons.",
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


# How a segment is watched: around the step, and in the options of its segments.
Watching = tuple[Callable[[], AbstractContextManager[object]], dict[str, Any]]
WATCHING: dict[str, Watching] = {
    "off": (nullcontext, {}),
    "off again": (nullcontext, {}),
    "recording, no events": (partial(ledger.record, events=False), {}),
    "recording": (ledger.record, {}),
    "bitwise": (nullcontext, {"determinism_check": "bitwise"}),
    "debug": (nullcontext, {"debug": True}),
}

Program = Callable[[Tensor], Tensor]
# By program and variant: a step, and what it takes longer than the first variant, in seconds.
Shares = dict[str, dict[str, tuple[Summary, Summary]]]


def programs() -> dict[str, tuple[Program, tuple[int, ...]]]:
    return {
        "tanh": (torch.tanh, (4, 4)),
        "Linear, Tanh": (nn.Sequential(nn.Linear(4, 4), nn.Tanh()), (4, 4)),
        "Linear, BatchNorm": (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), (4, 4)),
    }


def watched_programs() -> dict[str, tuple[Program, tuple[int, ...]]]:
    return {
        "tanh": (torch.tanh, (4, 4)),
        "8 x (matmul, tanh)": (matmul_tanh().chain[0], (4, 4)),
    }


def step(run: Checkpointer, function: Program, value: Tensor) -> None:
    """Forward and backward of a chain of ``SEGMENTS`` segments."""
    for _ in range(SEGMENTS):
        value = run(function, value)
    torch.autograd.backward(value.sum())


def watched_step(watching: Watching, function: Program, value: Tensor) -> None:
    around, given = watching
    with around():
        step(Checkpointer(**given), function, value)


def shares(
    screen: Screen,
    options: Options,
    label: str,
    programs: Mapping[str, tuple[Program, tuple[int, ...]]],
    variants: Callable[[Program, Tensor], Mapping[str, Thunk]],
) -> Shares:
    """Times ``variants(function, value)`` of each program in turn, a step of ``SEGMENTS`` each."""
    found: Shares = {}
    with screen.progress(label, options.rounds * len(programs)) as bar:
        for program, (function, shape) in programs.items():
            thunks = variants(function, torch.randn(shape, requires_grad=True))
            first = next(iter(thunks))
            times = interleave(
                thunks,
                rounds=options.rounds,
                inner=calibrate(thunks[first], options.target_s),
                after_round=partial(bar.step, program),
            )
            of_one = {name: [t / SEGMENTS for t in series] for name, series in times.items()}
            found[program] = {
                name: (Summary.of(series), Summary.of_difference(series, of_one[first]))
                for name, series in of_one.items()
            }
    return found


def added_by_options(screen: Screen, options: Options) -> Shares:
    def variants(function: Program, value: Tensor) -> Mapping[str, Thunk]:
        return {
            name: partial(step, Checkpointer(**given), function, value)
            for name, given in OPTIONS.items()
        }

    return shares(screen, options, "options", programs(), variants)


def added_by_watching(screen: Screen, options: Options) -> Shares:
    def variants(function: Program, value: Tensor) -> Mapping[str, Thunk]:
        return {
            name: partial(watched_step, watching, function, value)
            for name, watching in WATCHING.items()
        }

    return shares(screen, options, "watching", watched_programs(), variants)


def tabulate(title: str, first: str, found: Shares) -> tuple[Table, list[Sequence[object]]]:
    """A row for each program: a segment's share of the first variant's step, what others add."""
    names = list(next(iter(found.values())))
    table = Table(title, ("", first, *names[1:]))
    lines: list[Sequence[object]] = []
    for program, variants in found.items():
        cells = [f"{variants[names[0]][0].min * 1e6:.1f}"]
        for name, (taken, added) in variants.items():
            for statistic in STATISTICS:
                for kind, summary in (("step", taken), ("added", added)):
                    value = getattr(summary, statistic) * 1e6
                    lines.append([kind, program, name, statistic, value, "us"])
            if name != names[0]:
                cells.append(f"{added.min * 1e6:.2f} / {added.median * 1e6:.2f}")
        table.add(program, *cells)
    return table, lines


def bandwidths(screen: Screen, options: Options) -> dict[tuple[str, str], Summary]:
    """By what is done and on how many threads; gigabytes a second, nanoseconds for "64 floats"."""
    large = torch.randn((1 << 16) if options.quick else (1 << 24))
    small = torch.randn(64)
    found: dict[tuple[str, str], Summary] = {}
    rounds = min(options.rounds, 15)

    def measure(where: str, values: Tensor, inner: int, finish: Thunk = nothing) -> None:
        target = torch.empty_like(values)
        times = interleave(
            {"fingerprint": lambda: _C.fingerprint(values), "copy_": lambda: target.copy_(values)},
            rounds=rounds,
            inner=inner,
            finish=finish,
            after_round=lambda: bar.step("large"),
        )
        for name, series in times.items():
            rates = [values.nbytes / taken / 1e9 for taken in series]
            found[name, where] = Summary(max(rates), statistics.median(rates))

    counts = sorted({1, cores()})
    on_device = torch.cuda.is_available() and _C.HAS_CUDA_KERNELS
    with screen.progress("bitwise", rounds * (len(counts) + 1 + on_device)) as bar:
        for threads in counts:
            with torch_threads(threads):
                measure(f"{threads} thread(s)", large, inner=2)
        times = interleave(
            {"fingerprint": lambda: _C.fingerprint(small)},
            rounds=rounds,
            inner=1000,
            after_round=lambda: bar.step("small"),
        )
        if on_device:
            # Larger than the device's cache: 1 GiB.
            there = torch.randn((1 << 16) if options.quick else (1 << 28), device="cuda")
            measure("CUDA, 1 GiB", there, inner=20, finish=torch.cuda.synchronize)
        found["fingerprint", "64 floats"] = Summary.of([t * 1e9 for t in times["fingerprint"]])
    return found


def run(screen: Screen, options: Options) -> Report:
    cost, lines = tabulate(
        "Microseconds that one segment takes longer, forward and replay (min / median)",
        "share of a step without both",
        added_by_options(screen, options),
    )
    watching, watched_lines = tabulate(
        "Microseconds that one segment takes longer while it is watched (min / median)",
        "share of a step, off",
        added_by_watching(screen, options),
    )
    lines += watched_lines
    rates = bandwidths(screen, options)
    speed = Table(
        "Bitwise comparison: GB/s of 64 MiB of float32 (best / median)",
        ("", "fingerprint", "copy_", "ratio of the medians"),
        caption=f"A tensor of 64 floats: {rates['fingerprint', '64 floats'].median:.0f} ns.",
    )
    failures = []
    for name, where in rates:
        for statistic in STATISTICS:
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
    return Report([cost, watching, speed], COLUMNS, lines, failures=failures)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; see ``Command.run`` for the exit status."""
    return COMMAND.run(argv, run)

"""How the cost of checkpointing grows, beside ``torch.utils.checkpoint``.

``python benchmarks/scaling.py [--rounds N] [--quick] [--csv FILE] [--plot FILE | --no-plot]``

Three sweeps, all on tensors of 4x4 and with one ``tanh`` a function, so that what is measured is
bookkeeping:

* segments: a chain of 10 to 10,000 segments in one graph. Unit: a segment.
* saved tensors: one segment with 1 to 1,000 saved tensors. Unit: a saved tensor. Only the
  non-reentrant form, for the reentrant one saves no tensors.
* nested: segments inside segments, 1 to 20 deep. A replay runs the function of its segment and with
  it all that lies inside, so that a backward replays far more than one forward. Unit: a replayed
  call of a function, counted in a step that is not timed.

    O = T(checkpointed step) - T(plain step) - R x T(one forward with gradients)

R is how often the forward is repeated: once, in the nested sweep replayed calls / depth. ``per
unit`` is O / units. ``added`` is what each unit beyond the smallest size adds, that is
(O(size) - O(smallest)) / (units(size) - units(smallest)): the constant cost of a segment or of
a backward drops out of it. How the T are measured is told in ``overhead``; here all sizes of
a sweep take turns in every round, for they are compared with each other; and each stretch begins
after an untimed step of its own, for one long step finds the caches as its neighbour left them,
where many short ones have filled them.

What should come out: a cost per unit that does not depend on the number of units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._command import Command, Options, Report, require_equal_gradients
from ._common import (
    Overheads,
    Screen,
    Summary,
    Table,
    Thunk,
    calibrate,
    interleave,
    short,
)
from ._programs import (
    FORMS,
    STATISTICS,
    Functions,
    Nested,
    Segment,
    Workload,
    by_label,
    check,
    implementations,
    nested,
    one_operator,
    saved_tensors,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COMMAND = Command(
    "scaling",
    "Growth of the cost of checkpointing with segments, saved tensors and depth.",
    rounds=15,
    target_s=0.006,
)
COLUMNS = (
    "sweep",
    "form",
    "implementation",
    "statistic",
    "size",
    "units",
    "rounds",
    "inner",
    "plain_us",
    "forward_us",
    "step_us",
    "overhead_us",
    "per_unit_us",
    "added_us",
)
SEGMENTS, SAVED, NESTED = "segments", "saved tensors", "nested"
UNITS = {SEGMENTS: "segment", SAVED: "saved tensor", NESTED: "replayed call"}


@dataclass(frozen=True)
class Sweep:
    """One way to grow: a program for each size."""

    name: str
    forms: Sequence[str]
    sizes: Sequence[int]
    program: Callable[[int], Workload]


def sweeps(quick: bool) -> list[Sweep]:
    """All sweeps; with ``quick`` a few small sizes of each."""
    both, first = FORMS, FORMS[:1]
    if quick:
        return [
            Sweep(SEGMENTS, both, (1, 10, 50), one_operator),
            Sweep(SAVED, first, (1, 10, 50), saved_tensors),
            Sweep(NESTED, both, (1, 3, 6), nested),
        ]
    return [
        Sweep(SEGMENTS, both, (10, 30, 100, 300, 1000, 3000, 10000), one_operator),
        Sweep(SAVED, first, (1, 3, 10, 30, 100, 300, 1000), saved_tensors),
        Sweep(NESTED, both, (1, 2, 4, 7, 10, 14, 20), nested),
    ]


def replayed_calls(depth: int, segment: Segment) -> int:
    """How many functions' operators run in one backward of ``nested(depth)``."""
    calls = 0

    def counted(value: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.tanh(value)

    value = torch.randn(4, 4, requires_grad=True)
    result = Nested("", [], [value], "step", depth, counted).forward(segment)
    calls = 0
    torch.autograd.backward(result.sum())
    return calls


@dataclass(frozen=True)
class Point:
    """One size of one sweep with one checkpoint function, in microseconds by statistic."""

    sweep: str
    label: str
    size: int
    units: int
    rounds: int
    inner: int
    plain: Summary
    forward: Summary
    step: Summary
    overhead: Summary

    def per_unit(self, statistic: str) -> float:
        return float(getattr(self.overhead, statistic)) / self.units

    def added(self, smallest: Point, statistic: str) -> float | None:
        """What a unit beyond ``smallest`` adds; None for that point itself."""
        if self.units == smallest.units:
            return None
        grown = getattr(self.overhead, statistic) - getattr(smallest.overhead, statistic)
        return float(grown) / (self.units - smallest.units)


# The points of one curve, smallest size first, by sweep and "name, form".
Curves = Mapping[tuple[str, str], Sequence[Point]]


def measure_sizes(
    programs: Mapping[int, Workload],
    functions: Functions,
    options: Options,
    on_round: Callable[[], object],
) -> dict[int, Overheads]:
    """Times all sizes of a sweep in the same rounds.

    Sizes are compared with each other: one after another, a machine that is busy for a minute would
    look like a cost that grows.
    """
    segments = by_label(functions)
    thunks: dict[str, Thunk] = {}
    inner: dict[str, int] = {}
    labels = ["plain", "forward", *segments]
    for size, program in programs.items():
        program.step()
        repeat = calibrate(program.step, options.target_s)
        timed: list[Thunk] = [program.step, program.forward]
        timed += [partial(program.step, segment) for segment in segments.values()]
        for label, thunk in zip(labels, timed, strict=True):
            thunks[f"{size} {label}"] = thunk
            inner[f"{size} {label}"] = repeat

    def after_round() -> None:
        for program in programs.values():
            program.drop_gradients()
        on_round()

    times = interleave(thunks, rounds=options.rounds, inner=inner, warm=1, after_round=after_round)
    return {
        size: Overheads(
            times[f"{size} plain"],
            times[f"{size} forward"],
            {label: times[f"{size} {label}"] for label in segments},
            inner[f"{size} plain"],
        )
        for size in programs
    }


def microseconds(times: Sequence[float]) -> Summary:
    return Summary.of([1e6 * value for value in times])


def points(sweep: Sweep, size: int, result: Overheads, functions: Functions) -> list[Point]:
    """One point for each checkpoint function."""
    found = []
    for label, segment in by_label(functions).items():
        units, repeats = size, 1.0
        if sweep.name == NESTED:
            units = replayed_calls(size, segment)
            repeats = units / size
        forward = [repeats * value for value in result.forward]
        whole = Overheads(result.plain, forward, result.steps, result.inner).of(label)
        found.append(
            Point(
                sweep.name,
                label,
                size,
                units,
                result.rounds,
                result.inner,
                microseconds(result.plain),
                microseconds(result.forward),
                microseconds(result.steps[label]),
                Summary(1e6 * whole.min, 1e6 * whole.median),
            )
        )
    return found


def lines(curves: Curves) -> list[list[object]]:
    """The CSV, in the order of ``COLUMNS``."""
    written: list[list[object]] = []
    for curve in curves.values():
        for point in curve:
            name, _, form = point.label.partition(", ")
            for statistic in STATISTICS:
                summaries = (point.plain, point.forward, point.step, point.overhead)
                added = point.added(curve[0], statistic)
                written.append(
                    [
                        *(point.sweep, form, name, statistic),
                        *(point.size, point.units, point.rounds, point.inner),
                        *(getattr(summary, statistic) for summary in summaries),
                        point.per_unit(statistic),
                        "" if added is None else added,
                    ]
                )
    return written


def tables(chosen: Sequence[Sweep], curves: Curves) -> list[Table]:
    """For each sweep and form the cost per unit at each size, from the minima of the rounds."""
    drawn = []
    for sweep in chosen:
        for form in sweep.forms:
            theirs, ours = (curves[sweep.name, f"{name}, {form}"] for name in ("torch", "ours"))
            unit = UNITS[sweep.name]
            drawn_table = Table(
                f"{sweep.name}, {form}: O per {unit} in microseconds",
                (
                    "depth" if sweep.name == NESTED else sweep.name,
                    f"{unit}s torch / ours" if sweep.name == NESTED else "plain step",
                    "torch",
                    "torch adds",
                    "ours",
                    "ours adds",
                    "ours / torch",
                ),
            )
            for their, our in zip(theirs, ours, strict=True):
                quotient = our.overhead.min / their.overhead.min if their.overhead.min > 0 else None
                drawn_table.add(
                    f"{our.size:,}",
                    f"{their.units} / {our.units}"
                    if sweep.name == NESTED
                    else f"{short(our.plain.min)} us",
                    short(their.per_unit("min")),
                    short(their.added(theirs[0], "min")),
                    short(our.per_unit("min")),
                    short(our.added(ours[0], "min")),
                    short(quotient),
                )
            drawn.append(drawn_table)
    return drawn


def spread(values: Sequence[float]) -> str:
    """``"3.1 to 3.4 us, within 10 %"``: how much more the largest is than the smallest."""
    low, high = min(values), max(values)
    text = f"{short(low)} to {short(high)} us"
    return f"{text}, within {100 * (high / low - 1):.0f} %" if low > 0 else text


def remarks(curves: Curves) -> list[str]:
    """How flat each curve is, for people."""
    said = ["Cost per unit over all sizes, and (from the second size on) what each unit more adds:"]
    for (sweep, label), curve in curves.items():
        per_unit = spread([point.per_unit("min") for point in curve])
        further = [point.added(curve[0], "min") for point in curve]
        added = spread([value for value in further if value is not None])
        said.append(f"  {f'{sweep}, {label}:':<37}{per_unit:<36}adds {added}")
    return said


def draw(curves: Curves, figure: Figure) -> None:
    """Cost per unit against size for the flat sweeps, whole cost against units for the nested."""
    from .._look import QUIET
    from ._plot import curve, log_axes

    figure.set_size_inches(13.5, 5.2)
    titles = {
        SEGMENTS: "Cost of a segment",
        SAVED: "Cost of a saved tensor",
        NESTED: "Cost of nesting",
    }
    at: dict[str, Axes] = dict(zip(titles, figure.subplots(1, 3), strict=True))
    for (sweep, label), measured in curves.items():
        x: list[float] = [point.units if sweep == NESTED else point.size for point in measured]
        y = [point.overhead.min if sweep == NESTED else point.per_unit("min") for point in measured]
        curve(at[sweep], label, x, y)
        if sweep == NESTED and label == f"torch, {FORMS[0]}":
            guide = [y[-1] * value / x[-1] for value in x]
            at[sweep].plot(x, guide, color=QUIET, linewidth=1, linestyle=":", label="proportional")
        if sweep == SAVED:
            further = [point.added(measured[0], "min") or 0.0 for point in measured]
            style = {"linestyle": ":", "marker": "", "label": "  each tensor beyond the first"}
            curve(at[sweep], label, x, further, **style)
    log_axes(at[SEGMENTS], "segments in one graph", "O per segment (µs)")
    log_axes(at[SAVED], "saved tensors in one segment", "O per saved tensor (µs)")
    log_axes(at[NESTED], "function calls replayed in one backward", "O of a step (µs)")
    for sweep, axes in at.items():
        axes.set_title(titles[sweep])
        low, high = axes.get_ylim()
        axes.set_ylim(low / 1.5, high * 8)  # the legend stands above the curves
        axes.legend(loc="upper left", fontsize=9)
    figure.supxlabel(
        "O = step - plain step - repeated forward; minimum of all rounds; one thread",
        fontsize=9,
        color=QUIET,
    )


def run(screen: Screen, options: Options, functions: Functions) -> Report:
    """Checks all programs, then measures all sweeps."""
    chosen = sweeps(options.quick)
    programs = {(sweep.name, n): sweep.program(n) for sweep in chosen for n in sweep.sizes}
    wrong = [name for program in programs.values() for name in check(program, functions)]
    require_equal_gradients(wrong)
    curves: dict[tuple[str, str], list[Point]] = {}
    with screen.progress("rounds", options.rounds * len(chosen)) as bar:
        for sweep in chosen:
            used = {form: functions[form] for form in sweep.forms}
            by_size = {size: programs[sweep.name, size] for size in sweep.sizes}
            results = measure_sizes(by_size, used, options, partial(bar.step, sweep.name))
            for size, result in results.items():
                for point in points(sweep, size, result, used):
                    curves.setdefault((sweep.name, point.label), []).append(point)
    return Report(
        tables(chosen, curves),
        COLUMNS,
        lines(curves),
        remarks=remarks(curves),
        draw=partial(draw, curves),
    )


def main(argv: Sequence[str] | None = None, functions: Functions | None = None) -> int:
    """Runs the benchmark: arguments and result as those of ``overhead.main``."""
    return COMMAND.run(argv, partial(run, functions=functions or implementations()))

"""Draws what the demo found: loss curves, memory over one step, time per step, bookkeeping.

matplotlib is imported where it is used: the demo says what is missing before anything runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._look import INK, QUIET, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .run import Report, Run

# One colour for each run in order, the reference first. The widths fall from run to run, so that
# curves that lie on each other show as one line with seams of every colour.
_COLOURS = ("#b9c2cc", "#ee8a45", "#1f6fb4", "#0d2b45")
_WIDTHS = (9.0, 5.0, 2.4, 1.0)


def draw(report: Report, path: Path) -> None:
    """Writes the picture; its format follows the suffix of ``path``."""
    # The object interface, not pyplot: no global figure, no backend that wants a display.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    style: dict[Any, Any] = {
        **STYLE,
        "font.size": 10,
        "axes.titlesize": 11.5,
        "axes.titlepad": 10,
    }
    checkpointed = [run for run in report.runs if run is not report.reference]
    with rc_context(style):
        figure = Figure(figsize=(11.5, 7.0), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
        FigureCanvasAgg(figure)
        # Two halves with a layout each: the names beside the bars are no margin for the curves.
        upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=(2.2, 1)).flat
        loss, memory = upper.subplots(1, 2)
        time, cost = lower.subplots(1, 2)
        _draw_losses(loss, report)
        _draw_memory(memory, report)
        _draw_bars(time, report, report.runs, report.step_ms, "{:.1f} ms")
        time.set_title("Time per training step")
        _draw_bars(cost, report, checkpointed, report.bookkeeping_us, "{:.0f} µs")
        cost.set_title("Bookkeeping per checkpointed block")
        figure.savefig(path, dpi=150)


def _colour(report: Report, run: Run) -> str:
    return _COLOURS[report.runs.index(run) % len(_COLOURS)]


def _width(report: Report, run: Run) -> float:
    return _WIDTHS[report.runs.index(run) % len(_WIDTHS)]


def _draw_losses(axes: Axes, report: Report) -> None:
    reference = [float(loss) for loss in report.reference.losses]
    steps = range(1, len(reference) + 1)
    largest = 0.0
    for run in report.runs:
        losses = [float(loss) for loss in run.losses]
        largest = max([largest, *(abs(a - b) for a, b in zip(losses, reference, strict=True))])
        axes.plot(
            steps,
            losses,
            color=_colour(report, run),
            linewidth=_width(report, run),
            label=run.name,
            solid_joinstyle="round",
            solid_capstyle="round",
        )
    count = len(report.runs)
    title = f"Training loss: {count} runs, one line" if report.exact else "Training loss"
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.set_ylabel("nats per character")
    axes.grid(axis="y", color="#eceff2")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, title=f"largest difference: {largest:g}", alignment="left")


def _draw_memory(axes: Axes, report: Report) -> None:
    """Memory over the course of a step.

    Forward and backward take half of the axis each, and inside a half every allocation and free is
    as wide as the others of its run: times would show the profiler and the machine's noise.
    """
    for run in report.runs:
        trace = run.memory
        if trace is None:
            continue
        reference = run is report.reference
        colour = _colour(report, run)
        at, live = [], []
        for start, sizes in enumerate((trace.forward, trace.backward)):
            at += [start + position / len(sizes) for position in range(1, len(sizes) + 1)]
            live += [size / 2**20 for size in sizes]
        if reference:
            axes.fill_between(at, live, step="post", color=colour, alpha=0.45, linewidth=0)
        axes.step(
            at,
            live,
            where="post",
            color=colour,
            linewidth=2.0 if reference else _width(report, run) * 0.8,
            label=f"{run.name}: {trace.held / 2**20:.1f} MiB",
        )
    top = max((run.memory.peak / 2**20 for run in report.runs if run.memory), default=0.0)
    axes.vlines(1, 0, top, color=QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=0.5)
    axes.set_title("Tensor memory over one step (MiB)")
    axes.set_xticks([0.5, 1.5], ["forward", "backward"])
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(0, 2)
    axes.set_ylim(0, 1.5 * top)  # room for the legend above the curves
    axes.grid(axis="y", color="#eceff2")
    axes.set_axisbelow(True)
    axes.legend(
        frameon=False, loc="upper right", title="held when the backward begins", alignment="left"
    )


def _draw_bars(
    axes: Axes, report: Report, runs: Sequence[Run], values: dict[str, float], form: str
) -> None:
    axes.barh(
        [run.name for run in runs],
        [values[run.name] for run in runs],
        color=[_colour(report, run) for run in runs],
        height=0.62,
    )
    for place, run in enumerate(
        runs
    ):  # also a bar that goes to the left has its label on the right
        axes.annotate(
            form.format(values[run.name]),
            (max(0.0, values[run.name]), place),
            xytext=(5, 0),
            textcoords="offset points",
            verticalalignment="center",
        )
    axes.axvline(0, color="#c8d0d8", linewidth=1)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.tick_params(axis="x", bottom=False, labelbottom=False)
    axes.spines[["bottom", "left"]].set_visible(False)
    axes.margins(x=0.25)

"""The look of all pictures: one colour for each library, one sort of line or bar for each form.

matplotlib is imported where it is used: the command says what is missing before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._look import INK, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GRID = "#e6eaee"
COLOURS = {"plain": "#aab4bf", "torch": "#e07b30", "ours": "#1f6fb4"}
# For the second form, beside a bar of the first.
PALE = {"plain": "#d5dbe1", "torch": "#f4c49c", "ours": "#9cc3e6"}

_STYLE: dict[Any, Any] = {
    **STYLE,
    "axes.labelcolor": INK,
    "axes.titlepad": 12,
    "axes.titlesize": 11.5,
    "font.size": 10,
    "legend.frameon": False,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


def save(path: Path, draw: Callable[[Figure], object]) -> None:
    """Lets ``draw`` fill a figure and writes it; the format follows the suffix of ``path``."""
    # The object interface, not pyplot: no global figure, no backend that wants a display.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(11.5, 5.0), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        figure.savefig(path, dpi=150)


def shown(name: str) -> str:
    """``"ours, reentrant"`` as a reader of a picture has to see it."""
    return name.replace("ours", "torch_reprise")


def library(name: str) -> str:
    """``"torch"`` of ``"torch, reentrant"``."""
    return name.partition(",")[0]


def is_second_form(name: str) -> bool:
    return name.endswith(", reentrant")


def curve(axes: Axes, name: str, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
    """A line with a mark for each measured point; dashed and hollow for the reentrant form.

    Points at or below zero are left out, for the axes are logarithmic.
    """
    points = [(a, b) for a, b in zip(x, y, strict=True) if b > 0]
    second = is_second_form(name)
    drawn: dict[str, Any] = {
        "color": COLOURS[library(name)],
        "label": shown(name),
        "linestyle": "--" if second else "-",
        "linewidth": 1.6,
        "marker": "o",
        "markersize": 5,
        "markerfacecolor": "white" if second else COLOURS[library(name)],
    }
    axes.plot([a for a, _ in points], [b for _, b in points], **{**drawn, **style})


def plain_numbers(axes: Axes) -> None:
    """Ticks as 1,000 and not as 10^3, and no numbers between the powers."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    for side in (axes.xaxis, axes.yaxis):
        if side is axes.yaxis or side.get_scale() != "linear":  # a linear x axis may have names
            side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
            side.set_minor_formatter(NullFormatter())


def log_axes(axes: Axes, x_label: str, y_label: str) -> None:
    """Both axes logarithmic, with plain numbers."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain_numbers(axes)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(which="major", color=GRID)
    axes.set_axisbelow(True)


def bars(
    axes: Axes,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    form: Callable[[float], str],
    *,
    colours: Mapping[str, str] | None = None,
    label_size: float = 8.5,
) -> None:
    """Groups of bars, a bar for each series, its value above it; None leaves a gap.

    The scale of the value axis is set before this is called.
    """
    series = {name: values for name, values in series.items() if any(v is not None for v in values)}
    width = 0.84 / len(series)
    for position, (name, values) in enumerate(series.items()):
        second = is_second_form(name)
        colour = (colours or {}).get(name) or (PALE if second else COLOURS)[library(name)]
        offset = (position - (len(series) - 1) / 2) * width
        there = [(place, value) for place, value in enumerate(values) if value is not None]
        axes.bar(
            [place + offset for place, _ in there],
            [value for _, value in there],
            width * 0.92,
            color=colour,
            label=shown(name),
        )
        for place, value in there:
            axes.annotate(
                form(value),
                (place + offset, max(value, 0.0)),
                xytext=(0, 2),
                textcoords="offset points",
                horizontalalignment="center",
                fontsize=label_size,
            )
    axes.set_xticks(range(len(groups)), list(groups))
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    plain_numbers(axes)

"""The picture as PNG, drawn by matplotlib without pyplot: no global figure, no display."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._look import INK, QUIET, STYLE
from ._picture import MOST_LAYERS, Picture
from ._spans import KINDS
from ._tables import readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
WIDTH = 11.5  # inches
KIND_COLOURS = {"forward": "#9aa7b4", "replay": "#ee7f35", "backward": "#4d5f73"}
_STYLE: dict[Any, Any] = {
    **STYLE,
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9.5,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "axes.titlesize": 11,
    "axes.titlepad": 10,
}


def height(picture: Picture) -> float:
    """Of the image in inches: a line for each segment as long as they are few."""
    return 0.9 + sum(_heights(picture))


def _heights(picture: Picture) -> list[float]:
    """Of the panels: what is held, if need be once more on a scale of its own, the timeline."""
    count = len(picture.rows)
    timeline = 0.9 + 0.19 * max(count, 3) if count <= MOST_LAYERS else 4.2
    return [2.6, 3.6, timeline] if _needs_overview(picture) else [4.1, timeline]


def _needs_overview(picture: Picture) -> bool:
    # Below the line of a deep network the stack is too flat to tell its layers apart.
    return 0 < 4 * picture.peak.bytes < picture.peak_without.bytes


def draw(picture: Picture, path: Path) -> None:
    """Writes it."""
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError(
            "Recording.save() needs matplotlib for a .png, and it is not installed: "
            "pip install 'torch-reprise[demo]'; a .html needs nothing"
        ) from error
    with rc_context(_STYLE):
        heights = _heights(picture)
        figure = Figure(
            figsize=(WIDTH, height(picture)),
            layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1),
        )
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
        *memory, timeline = panels
        _draw_heading(figure, picture)
        larger = max(picture.peak.bytes, picture.peak_without.bytes)
        _draw_memory(memory[0], picture, larger, "Bytes held by segments", legend=True)
        for axes in memory[1:]:
            _draw_memory(axes, picture, picture.peak.bytes, "The same, closer", legend=False)
        _draw_timeline(timeline, picture)
        if not picture.spans and not picture.series.times:
            for axes in panels:  # nothing happened: axes would only make numbers up
                axes.set_axis_off()
        figure.savefig(path, dpi=DPI, format="png")


def _draw_heading(figure: Figure, picture: Picture) -> None:
    words = [f"{name}: {value}" for name, value in picture.summary]
    lines = ["   ".join(words), *(line for n in picture.notes for line in textwrap.wrap(n, 150))]
    figure.suptitle(
        "\n".join(_drawable(lines)), x=0.01, horizontalalignment="left", fontsize=9.5, color=QUIET
    )


def _unit(largest: float, units: Sequence[tuple[str, float]]) -> tuple[str, float]:
    """The first of ``units``, from large to small, in which the value is not below 1."""
    return next((unit for unit in units if largest >= unit[1]), units[-1])


def _draw_memory(axes: Axes, picture: Picture, top: int, title: str, legend: bool) -> None:
    from matplotlib.patches import Patch

    unit, scale = _unit(top, [("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10), ("B", 1.0)])
    times, below = list(picture.series.times), [0.0] * len(picture.series.times)
    for layer, values in zip(picture.layers, picture.series.held, strict=True):
        above = [b + v / scale for b, v in zip(below, values, strict=True)]
        axes.fill_between(
            times,
            below,
            above,
            # Not where there is nothing: its edge would show. A step reaches to the next point.
            where=[v > 0 or before > 0 for v, before in zip(values, [0, *values], strict=False)],
            step="post",
            color=layer.colour,
            linewidth=0.3,
            zorder=2,
        )
        below = above
    handles: list[Any] = []
    labels: list[str] = []
    if picture.shows_without:
        without = [value / scale for value in picture.series.without]
        handles += axes.step(
            times, without, where="post", color=INK, linewidth=1.2, linestyle=(0, (4, 2)), zorder=3
        )
        labels.append(picture.without_label)
    for label, colour in reversed(picture.legend):  # the top of the stack first
        handles.append(Patch(color=colour))
        labels.append(_shortened(label))
    if picture.peak.bytes:
        at = picture.peak.time, picture.peak.bytes / scale
        axes.plot(*at, marker="o", color=INK, markersize=4.5, zorder=4)
        late = at[0] > (picture.begin + picture.end) / 2
        axes.annotate(
            f"peak {readable(picture.peak.bytes)}",
            at,
            xytext=(-8 if late else 8, 4),
            textcoords="offset points",
            horizontalalignment="right" if late else "left",
            fontweight="bold",
            zorder=4,
        )
    axes.set_title(title)
    axes.set_ylabel(unit)
    axes.set_ylim(0, 1.08 * top / scale or 1.0)
    axes.grid(axis="y", color="#eceff2")
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", labelbottom=False)
    if handles and legend:
        axes.legend(
            handles,
            _drawable(labels),
            frameon=False,
            loc="upper left",
            bbox_to_anchor=(1.01, 1.0),
            borderaxespad=0.0,
            fontsize=8.5,
        )


def _draw_timeline(axes: Axes, picture: Picture) -> None:
    from matplotlib.collections import PolyCollection
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    count = len(picture.rows)
    few = count <= MOST_LAYERS
    half = 0.36 if few else 0.5
    for kind in ("backward", "forward", "replay"):  # a replay lies on top
        boxes = [
            [
                (span.begin, span.row - half),
                (span.end, span.row - half),
                (span.end, span.row + half),
                (span.begin, span.row + half),
            ]
            for span in picture.spans
            if span.kind == kind
        ]
        # A line around each: what is narrower than a pixel shows nevertheless.
        axes.add_collection(
            PolyCollection(
                boxes,
                facecolors=KIND_COLOURS[kind],
                edgecolors=KIND_COLOURS[kind],
                linewidths=0.5 if few else 1.2,
            )
        )
    seconds = picture.end - picture.begin
    unit, scale = _unit(seconds, [("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)])
    axes.set_title("Forward, replay and backward of each segment")
    axes.set_xlabel(f"{unit} since the recording began")
    axes.set_xlim(picture.begin, picture.end if seconds else picture.begin + 1)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / scale:g}"))
    axes.set_ylim(max(count, 1) - 0.5, -0.5)
    axes.grid(axis="x", color="#eceff2")
    axes.set_axisbelow(True)
    if few:
        labels = [
            "\u203a " * row.depth + _shortened(label)
            for row, label in zip(picture.rows, picture.labels, strict=True)
        ]
        axes.set_yticks(range(count), _drawable(labels))
        axes.tick_params(axis="y", length=0, labelcolor=INK, labelsize=8.5)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"#{value + 1:,.0f}"))
    axes.legend(
        [Patch(color=KIND_COLOURS[kind]) for kind in KINDS],
        KINDS,
        frameon=False,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0.0,
        fontsize=8.5,
    )


def _shortened(label: str, most: int = 30) -> str:
    return label if len(label) <= most else f"{label[: most // 2]}\u2026{label[-most // 2 :]}"


def _drawable(texts: Sequence[str]) -> list[str]:
    """With an escape for each character that the font lacks: matplotlib would warn."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties(family=["DejaVu Sans"])))
    return [
        "".join(
            c
            if c == "\n" or (c.isprintable() and font.get_char_index(ord(c)))
            else c.encode("unicode_escape").decode("ascii")
            for c in text
        )
        for text in texts
    ]

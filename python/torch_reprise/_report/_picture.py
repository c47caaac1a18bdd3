"""What the PNG and the page show, computed once: layers, colours, series, spans and the summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import Events
from ._series import Peak, Series, changes, peaks, peaks_of_rows, series
from ._spans import Span, covered, first_time, last_time, spans
from ._tables import readable

if TYPE_CHECKING:
    from torch_reprise.ledger import Row

MOST_LAYERS = 40
_MOST_NAMES = 10
_MOST_IN_LEGEND = 12
_MOST_POINTS = 2000
_MOST_SPANS = 30_000

# A name has a hue, and its segments go from the first colour to the second. All of them can be told
# from white and from the page's dark background, and none is the colour of a replay.
_HUES = (
    ("#2b63a6", "#a3c9f0"),
    ("#157f78", "#8fd8cd"),
    ("#6a4bb0", "#c6b2ee"),
    ("#b03a6c", "#f0adc9"),
    ("#3f7d35", "#aed89c"),
    ("#a0760f", "#ead282"),
    ("#1d7fa0", "#9ad7ec"),
    ("#85583a", "#d6b69d"),
    ("#454fb5", "#b0b8f2"),
    ("#6f7a1f", "#cfd78c"),
)
_GREYS = ("#6b7680", "#b4bdc6")
_OTHERS = "other functions"


@dataclass(frozen=True)
class Layer:
    """A stripe of the stack: one segment, or several where there are too many."""

    label: str
    colour: str
    name: str
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Picture:
    """All of one picture. Times are seconds since the recording began, sizes are bytes."""

    rows: Sequence[Row]
    labels: Sequence[str]
    """For each row its number and short name, e.g. ``#3 Block``."""
    layers: Sequence[Layer]
    legend: Sequence[tuple[str, str]]
    """Labels and colours from the bottom of the stack: each layer, or each name."""
    layer_of: Sequence[int]
    row_peaks: Sequence[int]
    series: Series
    spans: Sequence[Span]
    begin: float
    end: float
    peak: Peak
    peak_without: Peak
    summary: Sequence[tuple[str, str]]
    notes: Sequence[str]

    @property
    def shows_without(self) -> bool:
        """Is there anything to draw a line of?"""
        return self.peak_without.bytes > 0

    @property
    def without_label(self) -> str:
        """What the dashed line is."""
        mixed = any(row.reentrant for row in self.rows)
        return "without checkpointing" + (" (segments with hooks only)" if mixed else "")


def short(name: str) -> str:
    """A name without the functions that it is defined in."""
    return name.rpartition("<locals>.")[2]


def picture(rows: Sequence[Row], events: Events) -> Picture:
    """Computes it. ``events`` has a list for each row."""
    of = changes(events)
    row_peaks = peaks_of_rows(of, len(rows))
    layers = _layers(rows, row_peaks)
    layer_of = [0] * len(rows)
    for index, layer in enumerate(layers):
        for row in layer.rows:
            layer_of[row] = index
    peak, peak_without = peaks(of)
    all_spans = spans(events)
    begin, end = first_time(events), last_time(events)
    drawn = all_spans
    if len(all_spans) > _MOST_SPANS:
        longest = sorted(all_spans, key=lambda span: span.begin - span.end)[:_MOST_SPANS]
        drawn = sorted(longest)
    return Picture(
        rows=rows,
        labels=[f"#{i} {short(row.name)}" for i, row in enumerate(rows, 1)],
        layers=layers,
        legend=_legend(layers),
        layer_of=layer_of,
        row_peaks=row_peaks,
        series=series(of, layer_of, len(layers), _MOST_POINTS),
        spans=drawn,
        begin=begin,
        end=end,
        peak=peak,
        peak_without=peak_without,
        summary=_summary(rows, all_spans, end - begin, peak, peak_without),
        notes=_notes(rows, events, len(all_spans), len(drawn)),
    )


def _summary(
    rows: Sequence[Row], of: Sequence[Span], seconds: float, peak: Peak, without: Peak
) -> list[tuple[str, str]]:
    replaying = covered(span for span in of if span.kind == "replay")
    share = f"{100 * replaying / seconds:.1f} % of {duration(seconds)}" if seconds else "-"
    generators = sorted({name for row in rows for name in row.generators})
    return [
        ("segments", f"{len(rows):,}"),
        ("replays", f"{sum(row.replays for row in rows):,}"),
        ("time in replays", share),
        ("peak held", readable(peak.bytes)),
        ("peak without checkpointing", readable(without.bytes) if without.bytes else "-"),
        ("drew from", ", ".join(generators) or "-"),
    ]


def _notes(rows: Sequence[Row], events: Events, all_spans: int, drawn: int) -> list[str]:
    notes = []
    if not rows:
        notes.append("Nothing was recorded: no segment began in the block.")
    elif not any(events):
        notes.append("The recording was made without events: there are only rows.")
    if any(row.reentrant for row in rows):
        notes.append(
            "Of a reentrant segment the inputs count as held. What its replay computes is kept by "
            "a graph of its own and not counted, nor is what there would be without checkpointing."
        )
    if drawn < all_spans:
        notes.append(f"Of {all_spans:,} spans the longest {drawn:,} are drawn.")
    return notes


def duration(seconds: float) -> str:
    """A time with a unit, e.g. ``1.25 ms``."""
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.2f} {unit}"
    return f"{seconds * 1e6:.1f} µs"


def _layers(rows: Sequence[Row], row_peaks: Sequence[int]) -> list[Layer]:
    by_name: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        by_name.setdefault(row.name, []).append(index)
    hues = {name: _HUES[i % len(_HUES)] for i, name in enumerate(by_name)}
    if len(rows) <= MOST_LAYERS:
        return _in_order([(name, [[i] for i in own]) for name, own in by_name.items()], hues)
    if len(by_name) > _MOST_NAMES:
        # Names that hold little share their layers.
        weight = {name: sum(row_peaks[i] for i in own) for name, own in by_name.items()}
        kept = sorted(by_name, key=lambda name: -weight[name])[: _MOST_NAMES - 1]
        others = sorted(i for name, own in by_name.items() if name not in kept for i in own)
        by_name = {name: own for name, own in by_name.items() if name in kept}
        hues = {name: _HUES[i] for i, name in enumerate(by_name)}
        by_name[_OTHERS], hues[_OTHERS] = others, _GREYS
    spare = MOST_LAYERS - len(by_name)
    groups = [
        (name, _pieces(own, 1 + spare * len(own) // len(rows))) for name, own in by_name.items()
    ]
    return _in_order(groups, hues)


def _legend(layers: Sequence[Layer]) -> list[tuple[str, str]]:
    if len(layers) <= _MOST_IN_LEGEND:
        return [(layer.label, layer.colour) for layer in layers]
    by_name: dict[str, list[Layer]] = {}
    for layer in layers:
        by_name.setdefault(layer.name, []).append(layer)
    return [
        (f"{sum(len(one.rows) for one in own):,} \u00d7 {short(name)}", own[len(own) // 2].colour)
        for name, own in by_name.items()
    ]


def _pieces(items: list[int], count: int) -> list[list[int]]:
    """At most ``count`` pieces whose sizes differ by at most one."""
    count = min(count, len(items))
    return [items[len(items) * k // count : len(items) * (k + 1) // count] for k in range(count)]


def _in_order(
    groups: Sequence[tuple[str, list[list[int]]]], hues: dict[str, tuple[str, str]]
) -> list[Layer]:
    """Layers in the order in which their first segments began, which is that of the stack."""
    layers = []
    for name, pieces in groups:
        for k, piece in enumerate(pieces):
            first, last = piece[0] + 1, piece[-1] + 1
            number = f"#{first:,}" if first == last else f"#{first:,}\u2013#{last:,}"
            colour = _between(*hues[name], k / max(len(pieces) - 1, 1))
            layers.append(Layer(f"{number} {short(name)}", colour, name, tuple(piece)))
    return sorted(layers, key=lambda layer: layer.rows[0])


def _between(first: str, second: str, share: float) -> str:
    channels = (
        round(int(first[k : k + 2], 16) * (1 - share) + int(second[k : k + 2], 16) * share)
        for k in (1, 3, 5)
    )
    return "#" + "".join(f"{channel:02x}" for channel in channels)

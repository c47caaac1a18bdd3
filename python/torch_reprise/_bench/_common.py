"""What every benchmark needs: interleaved timing, one table for every output, CSV, machine facts.

Used by the benchmarks and by the demo; nothing in the library itself may import it.

Why interleaved: on a machine with turbo clocks and neighbours, two runs a minute apart differ by
more than the microseconds that are measured here. All variants of a workload therefore take turns
in every round, in an order that rotates, and only numbers of the same process are compared.
"""

from __future__ import annotations

import contextlib
import csv
import gc
import importlib.util
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

Thunk = Callable[[], object]


def missing(*packages: str) -> str | None:
    """Says which of ``packages`` are not installed and how to get them, or None if all are there.

    Asked before any work is done, so that nobody waits a minute for an ImportError.
    """
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    names = " and ".join(absent)
    verb = "is" if len(absent) == 1 else "are"
    return f"{names} {verb} needed here and not installed: pip install {' '.join(absent)}"


# --------------------------------------------------------------------------------------------------
# Timing
# --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Runs the body with ``count`` intra-op threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    """Collects now and keeps the collector out of the body, where it would land on anyone."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def nothing() -> None:
    """Work on the CPU is done when its call returns."""


def seconds(thunk: Thunk, inner: int, finish: Thunk = nothing) -> float:
    """Seconds per call over ``inner`` calls in a row; ``finish`` waits for what they began."""
    finish()
    start = time.perf_counter()
    for _ in range(inner):
        thunk()
    finish()
    return (time.perf_counter() - start) / inner


def calibrate(thunk: Thunk, target_s: float, finish: Thunk = nothing) -> int:
    """The number of calls that takes about ``target_s``: far above the resolution of the clock."""
    inner = 1
    while True:
        taken = seconds(thunk, inner, finish) * inner
        if taken >= target_s / 2:
            return max(1, round(inner * target_s / taken))
        inner *= 2


def interleave(
    variants: Mapping[str, Thunk],
    *,
    rounds: int,
    inner: int | Mapping[str, int],
    warm: int = 0,
    finish: Thunk = nothing,
    after_round: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Times every variant once a round and returns seconds per call, one entry a round each.

    The order rotates by one from round to round, so that no variant is always the first. Before
    a long stretch a few calls fill the caches again that the neighbour has emptied. Garbage is
    collected between rounds and never inside a timed stretch.

    Args:
        inner: calls in a row in a stretch, the same for all variants or for each its own.
        warm: untimed calls before each stretch, be it ever so short.
        finish: called before and after each stretch: waits for a device.
        after_round: called where nothing is timed.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    repeats = dict.fromkeys(names, inner) if isinstance(inner, int) else inner
    for thunk in variants.values():  # once unmeasured: first calls allocate and fill caches
        thunk()
    for round_ in range(rounds):
        shift = round_ % len(names)
        with collector_off():
            for name in names[shift:] + names[:shift]:
                for _ in range(max(warm, min(3, repeats[name] // 10))):
                    variants[name]()
                times[name].append(seconds(variants[name], repeats[name], finish))
        after_round()
    return times


@dataclass(frozen=True)
class Summary:
    """Minimum and median of one series, in the unit of the series."""

    min: float
    median: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        return cls(min(values), statistics.median(values))

    @classmethod
    def of_difference(cls, longer: Sequence[float], shorter: Sequence[float]) -> Summary:
        """Of the minima, and the median of the differences of the rounds."""
        rounds = [a - b for a, b in zip(longer, shorter, strict=True)]
        return cls(min(longer) - min(shorter), statistics.median(rounds))


@dataclass(frozen=True)
class Overheads:
    """Bookkeeping of several checkpoint functions on one workload: seconds per step, by round.

    Attributes:
        plain: a step without checkpointing.
        forward: one forward with gradients of what the segments contain, and nothing else.
        steps: a step with each checkpoint function.
        inner: how many steps in a row were timed in each round.
    """

    plain: list[float]
    forward: list[float]
    steps: dict[str, list[float]]
    inner: int

    @property
    def rounds(self) -> int:
        return len(self.plain)

    def of(self, name: str) -> Summary:
        """O = T(checkpointed step) - T(plain step) - T(one forward with gradients).

        ``min`` takes the minimum of each T by itself. ``median`` takes O in each round, whose three
        T were measured next to each other, and the median of those.
        """
        rounds = zip(self.steps[name], self.plain, self.forward, strict=True)
        return Summary(
            min(self.steps[name]) - min(self.plain) - min(self.forward),
            statistics.median(step - plain - forward for step, plain, forward in rounds),
        )


def measure_overheads(
    plain: Thunk,
    forward: Thunk,
    checkpointed: Mapping[str, Thunk],
    *,
    rounds: int,
    target_s: float,
    after_round: Callable[[], object] = lambda: None,
) -> Overheads:
    """Times the plain step, the forward and every checkpointed step, round by round.

    ``forward`` has to free its graph, as a replay does. ``target_s`` is about how long the plain
    step is repeated in each round.
    """
    plain()
    inner = calibrate(plain, target_s)
    # Positions stand for names here, so that a checkpoint function may have any name.
    thunks = [plain, forward, *checkpointed.values()]
    times = interleave(
        {str(position): thunk for position, thunk in enumerate(thunks)},
        rounds=rounds,
        inner=inner,
        after_round=after_round,
    )
    series = list(times.values())
    return Overheads(series[0], series[1], dict(zip(checkpointed, series[2:], strict=True)), inner)


# --------------------------------------------------------------------------------------------------
# Machine facts
# --------------------------------------------------------------------------------------------------


def processor() -> str:
    """The processor's name, as far as the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use, which a container makes fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine_facts() -> dict[str, str]:
    """What a reader needs to judge the numbers of a table."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "cores": str(cores()),
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
    }


# --------------------------------------------------------------------------------------------------
# Output
# --------------------------------------------------------------------------------------------------


def short(value: object) -> str:
    """A figure with about three digits; ``-`` for what is no figure."""
    if not isinstance(value, float):
        return "-"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"


@dataclass
class Table:
    """Rows of text under a title. The first column is left-aligned, all others right-aligned."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    caption: str = ""

    def add(self, *cells: str) -> None:
        if len(cells) != len(self.columns):
            raise ValueError(f"table has {len(self.columns)} columns, got {len(cells)} cells")
        self.rows.append(cells)


class Screen:
    """Prints tables, lines and a progress bar through rich; a pipe gets plain lines, no bar.

    A pipe has no width of its own; 124 columns are assumed there so that tables do not wrap.
    """

    def __init__(self) -> None:
        from rich.console import Console

        probe = Console()
        self._console = probe if probe.is_terminal else Console(width=124)

    @property
    def is_terminal(self) -> bool:
        return self._console.is_terminal

    def line(self, text: str = "", style: str | None = None) -> None:
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def table(self, table: Table) -> None:
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        drawn = RichTable(
            title=table.title,
            title_justify="left",
            title_style="bold",
            caption=table.caption or None,
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        for position, name in enumerate(table.columns):
            left = position == 0
            drawn.add_column(name, justify="left" if left else "right", no_wrap=left)
        for row in table.rows:
            drawn.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
        self._console.print(drawn)

    def facts(self) -> None:
        """One line about the machine."""
        facts = machine_facts()
        self.line(
            f"torch {facts['torch']}, Python {facts['python']}, {facts['system']}, "
            f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} thread(s)",
            style="dim",
        )

    def progress(self, label: str, total: int) -> Progress:
        return Progress(self, label, total)


# Cells that are a verdict get a colour on a terminal; the word carries the meaning everywhere.
_STYLES = {"equal": "green", "differs": "bold red"}


class Progress:
    """``with screen.progress("training", steps) as bar: bar.step("loss 2.31")``.

    On a terminal a bar; elsewhere one line for each tenth of the way, so that logs stay short.
    """

    def __init__(self, screen: Screen, label: str, total: int) -> None:
        self._screen = screen
        self._label = label
        self._total = total
        self._done = 0
        self._bar: Any = None  # rich.progress.Progress, imported only where it is drawn
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self._screen.is_terminal:
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeRemainingColumn,
            )
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self._screen._console,
            )
            self._task = self._bar.add_task(self._label, total=self._total, note="")
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, note: str = "") -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.update(self._task, advance=1, note=note)
        elif self._done * 10 // self._total > (self._done - 1) * 10 // self._total:
            self._screen.line(f"{self._label}: {self._done}/{self._total}  {note}".rstrip())
            sys.stdout.flush()


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Writes one table; floats keep enough digits to be read back as they are."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)

"""What it costs to replay with the random numbers of the forward, beside torch.

``python benchmarks/rng_stash.py [--rounds N] [--quick] [--csv FILE] [--plot FILE | --no-plot]``

For the CPU alone and for 1, 2, 4 and 8 CUDA devices, as many as there are. Every number of devices
has a process of its own that sees no others, in which torch and ours take turns.

Operations, each timed in a stretch with draws, from which the time of the draws alone is taken:

* capture: ``rng.capture()``; ``torch.get_rng_state()`` and torch's ``get_device_states(*tensors)``.
* restore: ``snapshot.restore()``; ``torch.set_rng_state()`` and ``set_device_states()``.
* fork: ``rng.fork()``; ``torch.random.fork_rng()`` of the CPU and all devices.
* by hand: a whole cycle written with these: state before the forward captured; for the replay the
  current state captured, the other put in, and the current one put back.
* cycle: the same as a segment pays for it. A step of 20 segments with ``preserve_rng_state=True``
  minus the same step with False, in the non-reentrant form, divided by 20. This is the figure that
  counts.

What varies: whether the segment draws from all devices, from one, or not at all, and whether it has
1 or 12 tensor arguments on each device. torch keeps the state of a device once for every tensor
argument on it; ours knows the generators and keeps those that can have moved. The gradient flows on
the CPU in every case, so that threads of devices do not disturb the clock.

``bytes``: what every further live segment keeps of random states. Beside that ours has a few bytes
that segments share, however many they are: ``shared``.

Before anything is timed: gradients and the states of all generators after a step equal those of the
plain step, and the numbers drawn in the replay those of the forward.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from . import _child, _rng_cases
from ._command import Command, Differs, Options, Report
from ._common import Screen, Table, short
from ._programs import STATISTICS
from ._rng_cases import kinds, numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMMAND = Command("rng", "Cost of stashing and restoring random states.", rounds=31, target_s=0.004)
COLUMNS = (
    "devices",
    "simulated",
    "draws",
    "arguments",
    "operation",
    "statistic",
    "rounds",
    "torch_inner",
    "ours_inner",
    "torch_us",
    "ours_us",
    "ratio",
    "torch_bytes",
    "ours_bytes",
    "torch_shared_bytes",
    "ours_shared_bytes",
)


def is_simulated() -> bool:
    """Whether the devices are those of ``tests/cudasim``."""
    return hasattr(ctypes.CDLL(None), "cudasim_set_capturing")


def only_first_devices(count: int) -> dict[str, str]:
    """Environment of a process that sees the first ``count`` of the CUDA devices seen here."""
    if is_simulated():
        return {"CUDASIM_DEVICES": str(count)}
    known = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = known.split(",") if known else [str(index) for index in range(count)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[:count])}


def device_counts(quick: bool) -> list[int]:
    """0 for the CPU alone, then 1, 2, 4 and 8 as far as there are CUDA devices."""
    there = torch.cuda.device_count()
    return [0, *(count for count in ((1, 2) if quick else (1, 2, 4, 8)) if count <= there)]


# What was found, by number of devices and (draws, arguments, operation, statistic).
Found = Mapping[int, Mapping[tuple[str, int, str, str], Mapping[str, Any]]]


def device_name(count: int) -> str:
    return f"{count} CUDA" if count else "CPU"


def indexed(results: Mapping[int, Mapping[str, Any]]) -> Found:
    return {
        count: {
            (row[0], row[1], row[2], row[3]): dict(zip(COLUMNS[2:], row, strict=True))
            for row in result["rows"]
        }
        for count, result in results.items()
    }


def fraction(ratio: object) -> str:
    """``"1/23"`` of 0.0434; above a half as it is."""
    if not isinstance(ratio, float):
        return "-"
    return f"1/{1 / ratio:.0f}" if 0 < ratio < 0.5 else short(ratio)


def _most_shared(found: Found) -> float:
    return max(float(row["ours_shared_bytes"]) for rows in found.values() for row in rows.values())


def table(found: Found) -> Table:
    """One row for each case; microseconds, ``torch / ours``.

    From the minima, for the cycle is a small difference of large times; its ratio by medians too.
    """
    suffix = " (simulated devices)" if is_simulated() else ""
    shown = ("capture", "restore", "cycle")  # as wide as a screen; the CSV has all
    drawn = Table(
        f"Random state: microseconds torch / ours, minima of the rounds{suffix}",
        ("devices", "draws", "args", *shown, "ours is", "bytes kept"),
        caption=(
            "draws: from all of the devices, one or none. args: tensor arguments on each device.\n"
            "cycle: what a segment pays, capture, rewind and put back. ours is: ours / torch's\n"
            "in the cycle, by minima and by medians. bytes kept: by every further segment; all of\n"
            f"ours together share {_most_shared(found):,.0f} more at most."
        ),
    )
    for count, rows in found.items():
        previous = ""
        for draws, arguments, operation, statistic in rows:
            if (operation, statistic) != ("cycle", "min"):
                continue
            cells = [rows[draws, arguments, name, "min"] for name in shown]
            ratios = [rows[draws, arguments, "cycle", kind]["ratio"] for kind in STATISTICS]
            name = device_name(count)
            drawn.add(
                "" if name == previous else name,
                draws,
                str(arguments),
                *(f"{short(cell['torch_us'])} / {short(cell['ours_us'])}" for cell in cells),
                ", ".join(map(fraction, ratios)),
                f"{cells[-1]['torch_bytes']:,.0f} / {cells[-1]['ours_bytes']:,.0f}",
            )
            previous = name
    return drawn


def draw(found: Found, figure: Figure) -> None:
    """Cycle and bytes by number of devices, logarithmic."""
    from ._plot import COLOURS, PALE, bars

    figure.set_size_inches(12.5, 8.0)
    time, memory = figure.subplots(2, 1)
    rows = next(iter(found.values()))
    most = max(arguments for _, arguments, _, _ in rows)
    # Draws and arguments of a bar; torch's cost does not depend on what is drawn.
    series = {
        "torch, 1 tensor a device": ("torch", "all", 1, COLOURS["torch"]),
        f"torch, {most} tensors a device": ("torch", "all", most, PALE["torch"]),
        "ours, draws from all": ("ours", "all", most, COLOURS["ours"]),
        "ours, draws from one": ("ours", "one", most, "#5e9bd1"),
        "ours, draws nothing": ("ours", "none", most, PALE["ours"]),
    }
    groups = [device_name(count) for count in found]
    colours = {label: colour for label, (_, _, _, colour) in series.items()}
    for axes, quantity in ((time, "us"), (memory, "bytes")):
        values = {
            label: [
                cell[f"{name}_{quantity}"] if cell is not None else None
                for rows in found.values()
                for cell in [rows.get((draws, arguments, "cycle", "min"))]
            ]
            for label, (name, draws, arguments, _) in series.items()
        }
        form = "{:,.0f}".format if quantity == "bytes" else short
        axes.set_yscale("symlog", linthresh=0.1 if quantity == "us" else 10)
        bars(axes, groups, values, form, colours=colours, label_size=8)
    suffix = ", simulated devices" if is_simulated() else ""
    time.set_title(f"Random state: time for a segment (µs){suffix}")
    memory.set_title("Random state: bytes that a segment keeps")
    figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=3)


def run(screen: Screen, options: Options) -> Report:
    """Measures every number of devices in a process of its own."""
    counts = device_counts(options.quick)
    arguments = {"quick": options.quick, "rounds": options.rounds, "target_s": options.target_s}
    number = {count: len(kinds(count)) * len(numbers(options.quick)) for count in counts}
    results: dict[int, dict[str, Any]] = {}
    with screen.progress("rounds", 2 * options.rounds * sum(number.values())) as bar:
        for count in counts:

            def note(text: str, name: str = device_name(count)) -> None:
                bar.step(f"{name}: {text}")

            results[count] = _child.call(
                _rng_cases.__name__,
                "measure",
                {"count": count, **arguments},
                environment=only_first_devices(count) if count else None,
                on_note=note,
            )
            if results[count]["wrong"]:
                raise Differs(
                    f"{device_name(count)}: a step leaves behind something else than the plain one",
                    results[count]["wrong"],
                )
    found = indexed(results)
    lines = [
        [device_name(count), is_simulated() and count > 0, *row]
        for count, result in results.items()
        for row in result["rows"]
    ]
    return Report([table(found)], COLUMNS, lines, draw=partial(draw, found))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark: arguments and result as those of ``overhead.main``."""
    return COMMAND.run(argv, run)

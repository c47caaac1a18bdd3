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

``bytes``: what a live segment keeps of random states.

Before anything is timed: gradients and the states of all generators after a step equal those of the
plain step, and the numbers drawn in the replay those of the forward.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor

import torch_reprise
from torch_reprise import rng

from . import _child
from ._command import Command, Differs, Options, Report
from ._common import Screen, Summary, Table, Thunk, calibrate, interleave, short
from ._programs import STATISTICS, random_bytes

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
)
OPERATIONS = ("capture", "restore", "fork", "by hand", "cycle")
ARGUMENTS = (1, 12)
NAMES = ("torch", "ours")
# In one graph, so that starting a backward, which takes longer than they, is no part of the noise.
SEGMENTS = 20

# ``call(function, value, *tensors)`` runs a segment.
Call = Callable[..., Tensor]


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


# --------------------------------------------------------------------------------------------------
# In a process of its own: one number of devices
# --------------------------------------------------------------------------------------------------


def segment_calls() -> dict[str, dict[bool, Call]]:
    """Both libraries with and without the random state, otherwise called alike.

    A ``Checkpointer`` and not ``checkpoint`` for ours: the latter has a short way for calls with
    all options at their defaults, and that would count as a cost of the random state.
    """
    return {
        "torch": {
            preserve: partial(
                torch_checkpoint.checkpoint, use_reentrant=False, preserve_rng_state=preserve
            )
            for preserve in (True, False)
        },
        "ours": {
            preserve: torch_reprise.Checkpointer(preserve_rng_state=preserve)
            for preserve in (True, False)
        },
    }


class Case:
    """One segment: what it draws from, and its tensor arguments.

    Attributes:
        draws: "all", "one" or "none" of the devices.
        arguments: tensors on each device.
        on_cuda: whether torch has device states to look after.
    """

    def __init__(self, count: int, draws: str, arguments: int) -> None:
        self.draws = draws
        self.arguments = arguments
        self.on_cuda = count > 0
        devices = [torch.device("cuda", index) for index in range(count)] or [torch.device("cpu")]
        self.tensors = [torch.zeros(4, device=d) for d in devices for _ in range(arguments)]
        drawn = {"all": devices, "one": devices[:1], "none": []}[draws]
        self.noise = [torch.zeros(4, device=device) for device in drawn]
        self.value = torch.ones(4, 4, requires_grad=True)
        self.gradient = torch.ones(4, 4)
        # A plain function of few names: objects behind it would be searched for generators.
        noise = self.noise

        def function(value: Tensor, *tensors: Tensor) -> Tensor:
            for target in noise:
                target.uniform_()
            return torch.tanh(value)

        self.function = function

    def draw(self) -> None:
        for target in self.noise:
            target.uniform_()

    def forward(self, call: Call, segments: int = 1) -> Tensor:
        value = self.value
        for _ in range(segments):
            value = call(self.function, value, *self.tensors)
        return value

    def step(self, call: Call) -> None:
        torch.autograd.backward(self.forward(call, SEGMENTS), self.gradient)

    # What torch does, as torch.utils.checkpoint calls it.

    def torch_capture(self) -> tuple[Tensor, list[int], list[Tensor]]:
        state = torch.get_rng_state()
        if not self.on_cuda:
            return state, [], []
        return (state, *torch_checkpoint.get_device_states(*self.tensors))

    def torch_restore(self, states: tuple[Tensor, list[int], list[Tensor]]) -> None:
        torch.set_rng_state(states[0])
        if self.on_cuda:
            torch_checkpoint.set_device_states(states[1], states[2], device_type="cuda")

    def torch_by_hand(self) -> None:
        before = self.torch_capture()
        self.draw()
        with torch.random.fork_rng(devices=before[1], device_type="cuda"):
            self.torch_restore(before)
            self.draw()

    def ours_by_hand(self) -> None:
        before = rng.capture()
        self.draw()
        with rng.fork():
            before.restore()
            self.draw()

    def operations(self) -> dict[str, Thunk]:
        """What is timed by itself, by ``"operation, name"``, and the draws that are subtracted."""
        theirs, ours = self.torch_capture(), rng.capture()

        def after_draw(operation: Thunk) -> Thunk:
            def both() -> None:
                self.draw()
                operation()

            return both

        def torch_fork() -> None:
            with torch.random.fork_rng(devices=theirs[1], device_type="cuda"):
                self.draw()

        def ours_fork() -> None:
            with rng.fork():
                self.draw()

        return {
            "draw": after_draw(lambda: None),
            "draw twice": after_draw(self.draw),
            "capture, torch": after_draw(self.torch_capture),
            "capture, ours": after_draw(rng.capture),
            "restore, torch": after_draw(partial(self.torch_restore, theirs)),
            "restore, ours": after_draw(ours.restore),
            "fork, torch": torch_fork,
            "fork, ours": ours_fork,
            "by hand, torch": self.torch_by_hand,
            "by hand, ours": self.ours_by_hand,
        }

    def steps(self) -> dict[str, Thunk]:
        """Steps of ``SEGMENTS`` segments; with and without the state next to each other."""
        return {
            f"{'cycle' if preserve else 'no cycle'}, {name}": partial(self.step, call)
            for name, by_preserve in segment_calls().items()
            for preserve, call in by_preserve.items()
        }

    def subtracted(self, operation: str, name: str) -> str:
        """Whose time is taken from that of ``"operation, name"``."""
        return {"by hand": "draw twice", "cycle": f"no cycle, {name}"}.get(operation, "draw")

    # Checks

    def drawn(self) -> list[Tensor]:
        """The numbers drawn last, as bytes: where no kernel runs there may be a NaN."""
        return [target.cpu().view(torch.uint8) for target in self.noise]

    def outcome(self, call: Call) -> list[Tensor]:
        """All that a step leaves behind: gradient, generator states, numbers of both forwards."""
        torch.manual_seed(0)
        self.value.grad = None
        result = self.forward(call)
        first = self.drawn()
        torch.autograd.backward(result, self.gradient)
        assert self.value.grad is not None
        gradient, self.value.grad = self.value.grad, None
        return [gradient, *rng.capture().state_tensors().values(), *first, *self.drawn()]

    def wrong(self) -> list[str]:
        """Names what does not leave behind what the plain step does."""
        expected = self.outcome(lambda function, *args: function(*args))
        return [
            f"{name}, draws from {self.draws}, {self.arguments} tensors a device"
            for name, by_preserve in segment_calls().items()
            if not all(map(torch.equal, self.outcome(by_preserve[True]), expected))
        ]


def kinds(count: int) -> list[str]:
    """Which devices a segment draws from; with one device, all are one."""
    return ["all", "one", "none"] if count > 1 else ["all", "none"]


def numbers(quick: bool) -> Sequence[int]:
    """How many tensor arguments a segment has on each device."""
    return ARGUMENTS[:1] if quick else ARGUMENTS


def cases(count: int, quick: bool) -> list[Case]:
    return [Case(count, draws, n) for n in numbers(quick) for draws in kinds(count)]


def measure(
    tell: _child.Tell, count: int, quick: bool, rounds: int, target_s: float
) -> dict[str, Any]:
    """All operations on the CPU (``count`` 0) or on ``count`` CUDA devices.

    Returns:
        ``wrong``: the names of what does not compute what the plain step does; if there are none,
        ``rows``: for each case, operation and statistic what ``COLUMNS`` name from ``draws`` on.
    """
    torch.set_num_threads(1)
    if count:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        if torch.cuda.device_count() != count:
            raise RuntimeError(f"{count} devices expected, found {torch.cuda.device_count()}")
    programs = cases(count, quick)
    wrong = [name for program in programs for name in program.wrong()]
    if wrong:
        return {"wrong": wrong, "rows": []}
    rows = [row for program in programs for row in _rows(program, tell, rounds, target_s)]
    return {"wrong": [], "rows": rows}


def _rows(case: Case, tell: _child.Tell, rounds: int, target_s: float) -> list[list[object]]:
    def after_round() -> None:
        if case.on_cuda:  # what was launched does not run into the next stretch
            for index in range(torch.cuda.device_count()):
                torch.cuda.synchronize(index)
        case.value.grad = None
        tell(f"draws from {case.draws}, {case.arguments} tensors a device")

    times: dict[str, list[float]] = {}
    inner: dict[str, int] = {}
    for thunks in (case.operations(), case.steps()):
        # torch's can take a hundred times as long as ours: each its own number of calls.
        own = {name: calibrate(thunk, target_s) for name, thunk in thunks.items()}
        times.update(interleave(thunks, rounds=rounds, inner=own, after_round=after_round))
        inner.update(own)
    calls = segment_calls()
    kept = [random_bytes(partial(case.forward, calls[name][True])) for name in NAMES]
    rows: list[list[object]] = []
    for operation in OPERATIONS:
        labels = [f"{operation}, {name}" for name in NAMES]
        scale = 1e6 / SEGMENTS if operation == "cycle" else 1e6
        summaries = [
            _difference(times[label], times[case.subtracted(operation, name)])
            for label, name in zip(labels, NAMES, strict=True)
        ]
        for statistic in STATISTICS:
            figures = [scale * getattr(summary, statistic) for summary in summaries]
            ratio: object = figures[1] / figures[0] if figures[0] > 0 else ""
            head = [case.draws, case.arguments, operation, statistic, rounds]
            rows.append([*head, *(inner[label] for label in labels), *figures, ratio, *kept])
    return rows


def _difference(longer: Sequence[float], shorter: Sequence[float]) -> Summary:
    """Of the minima, and the median of the differences of the rounds."""
    rounds = [a - b for a, b in zip(longer, shorter, strict=True)]
    return Summary(min(longer) - min(shorter), Summary.of(rounds).median)


# --------------------------------------------------------------------------------------------------
# Output
# --------------------------------------------------------------------------------------------------

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


def table(found: Found) -> Table:
    """One row for each case; microseconds, ``torch / ours``.

    From the minima, for the cycle is a small difference of large times; its ratio by medians too.
    """
    suffix = " (simulated devices)" if is_simulated() else ""
    shown = [name for name in OPERATIONS if name != "by hand"]  # as wide as a screen
    drawn = Table(
        f"Random state: microseconds torch / ours, minima of the rounds{suffix}",
        ("devices", "draws", "args", *shown, "ours is", "bytes kept"),
        caption=(
            "draws: from all of the devices, one or none. args: tensor arguments on each device.\n"
            "cycle: what a segment pays, capture, rewind and put back. ours is: ours / torch's\n"
            "in the cycle, by minima and by medians."
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
    figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=5)


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
                __name__,
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

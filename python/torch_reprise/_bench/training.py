"""What checkpointing costs in training: GPTs of three widths, plain, with torch and with ours.

``python benchmarks/training.py [--device cpu | cuda] [--rounds N] [--quick] [--csv FILE]
[--plot FILE | --no-plot]``

Every block of a GPT is a segment. A step is a forward, the loss and a backward into fresh
gradients; the optimizer is left out, for it does the same work in every variant. All variants share
one network, run on one thread and take turns in every round. Before anything is timed, every
variant has to give the gradients of the plain step, bit for bit, dropout included.

The figure that counts is the step time of ours / torch's. ``min`` is the quotient of the minima of
all rounds, ``median`` the median of the quotients of the rounds: the two times of a round were
measured next to each other.

``held`` and ``peak`` are bytes of tensors alive when the backward begins, and most of all at any
moment of a step, gradients included; see ``memory``.

On a CUDA device the networks are larger and run under autocast to bfloat16, a stretch of steps ends
when the device is done, and bytes are those that its allocator counts. Gradients are compared with
deterministic algorithms and timed with torch's defaults.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._demo.model import GPT, GPTConfig
from .._demo.run import MemoryTrace
from ._command import Command, Options, Report, require_equal_gradients
from ._common import Screen, Summary, Table, calibrate, interleave, nothing, short
from ._programs import (
    FORMS,
    PLAIN,
    STATISTICS,
    Functions,
    Segment,
    Workload,
    check,
    gpt_trace,
    implementations,
    plainly,
    variants,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMMAND = Command(
    "training",
    "Step time, memory and tokens a second of GPTs of three widths.",
    rounds=15,
    on_devices=True,
)
COLUMNS = (
    "program",
    "layers",
    "width",
    "batch",
    "length",
    "form",
    "implementation",
    "statistic",
    "rounds",
    "inner",
    "step_ms",
    "tokens_per_s",
    "to_plain",
    "to_torch",
    "held_bytes",
    "peak_bytes",
)
VOCABULARY = 128


@dataclass(frozen=True)
class Shape:
    """Sizes of one program; heads are 64 wide."""

    layers: int
    width: int
    batch: int
    length: int

    @property
    def name(self) -> str:
        return f"width {self.width}, {self.batch}x{self.length}"

    @property
    def tokens(self) -> int:
        return self.batch * self.length


def shapes(quick: bool, device: str) -> list[Shape]:
    if quick:
        return [Shape(2, 32, 1, 8), Shape(2, 64, 1, 8)]
    if device == "cuda":
        return [Shape(12, 256, 8, 128), Shape(12, 768, 8, 1024), Shape(12, 2048, 8, 1024)]
    return [Shape(6, 128, 4, 32), Shape(6, 256, 4, 32), Shape(6, 256, 8, 64), Shape(6, 512, 4, 32)]


@dataclass(frozen=True)
class Training(Workload):
    """One network and one batch; a step ends with gradients in the parameters, its leaves."""

    model: GPT
    inputs: Tensor
    targets: Tensor

    def forward(self, segment: Segment = plainly) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=self.inputs.is_cuda):
            hidden = self.model.run_blocks(self.model.embed(self.inputs), segment)
            return self.model.loss(hidden, self.targets)

    def step(self, segment: Segment = plainly) -> None:
        self.drop_gradients()
        torch.autograd.backward(self.forward(segment))


def training(shape: Shape, device: str) -> Training:
    heads = max(1, shape.width // 64)
    config = GPTConfig(shape.layers, shape.width, heads, shape.length, VOCABULARY, 0.1)
    model = GPT(config).to(device)
    inputs, targets = torch.randint(VOCABULARY, (2, shape.batch, shape.length)).to(device)
    return Training(shape.name, [], list(model.parameters()), "step", model, inputs, targets)


@dataclass(frozen=True)
class Measured:
    """One shape: seconds per step by round, and memory over one step, by variant."""

    shape: Shape
    inner: int
    times: dict[str, list[float]]
    memory: dict[str, MemoryTrace]

    def step_s(self, label: str, statistic: str) -> float:
        return float(getattr(Summary.of(self.times[label]), statistic))

    def ratio(self, label: str, base: str, statistic: str) -> float:
        """Step time of ``label`` / that of ``base``."""
        times, bases = self.times[label], self.times[base]
        if statistic == "min":
            return min(times) / min(bases)
        return statistics.median(a / b for a, b in zip(times, bases, strict=True))


def memory_of_step(program: Training, segment: Segment) -> MemoryTrace:
    """Bytes over one step; of a CUDA device what its allocator says at the two points asked for."""
    if not program.inputs.is_cuda:
        return gpt_trace(program.model, segment, program.inputs, program.targets)
    program.drop_gradients()
    torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = program.forward(segment)
    held = torch.cuda.memory_allocated() - start
    torch.autograd.backward(loss)
    peak = torch.cuda.max_memory_allocated() - start
    return MemoryTrace([held], [peak])


def differing(program: Training, functions: Functions) -> list[str]:
    """Variants with other gradients. On a GPU equal bits need deterministic algorithms."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(program.inputs.is_cuda)
    try:
        return check(program, functions)
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def measure(
    program: Training,
    shape: Shape,
    functions: Functions,
    options: Options,
    on_round: Callable[[], object],
) -> Measured:
    """Times all variants of one program, then traces the memory of one step of each."""
    chosen = variants(functions)
    finish, target_s = nothing, options.target_s
    if options.device == "cuda":
        # Long enough for the host to be as far ahead of the device as in a training.
        finish, target_s = torch.cuda.synchronize, 10 * target_s
    program.step()
    inner = calibrate(program.step, target_s, finish)
    times = interleave(
        {label: partial(program.step, segment) for label, segment in chosen.items()},
        rounds=options.rounds,
        inner=inner,
        finish=finish,
        after_round=on_round,
    )
    memory = {label: memory_of_step(program, segment) for label, segment in chosen.items()}
    program.drop_gradients()
    return Measured(shape, inner, times, memory)


def lines(measured: Sequence[Measured]) -> list[list[object]]:
    """The CSV, in the order of ``COLUMNS``."""
    written: list[list[object]] = []
    for one in measured:
        shape = one.shape
        for label, trace in one.memory.items():
            name, _, form = label.partition(", ")
            for statistic in STATISTICS:
                step_s = one.step_s(label, statistic)
                written.append(
                    [
                        *(shape.name, shape.layers, shape.width, shape.batch, shape.length),
                        *(form, name, statistic, len(one.times[label]), one.inner),
                        *(1e3 * step_s, shape.tokens / step_s),
                        one.ratio(label, PLAIN, statistic),
                        one.ratio(label, f"torch, {form}", statistic) if form else "",
                        *(trace.held, trace.peak),
                    ]
                )
    return written


def tables(measured: Sequence[Measured]) -> list[Table]:
    """One table for each shape; a cell of times is ``min / median``."""
    drawn = []
    for one in measured:
        shape = one.shape
        table = Table(
            f"{shape.layers} GPT blocks of width {shape.width}, batch {shape.batch}x{shape.length}",
            ("", "step ms", "tokens a second", "/ plain", "/ torch", "held MiB", "peak MiB"),
        )
        for label, trace in one.memory.items():
            form = label.partition(", ")[2]
            step = [one.step_s(label, statistic) for statistic in STATISTICS]
            ratios = [
                " / ".join(f"{one.ratio(label, base, statistic):.3f}" for statistic in STATISTICS)
                if form and label != base
                else "-"
                for base in (PLAIN, f"torch, {form}")
            ]
            table.add(
                label,
                " / ".join(short(1e3 * value) for value in step),
                " / ".join(f"{shape.tokens / value:,.0f}" for value in step),
                *ratios,
                *(f"{count / 2**20:.2f}" for count in (trace.held, trace.peak)),
            )
        drawn.append(table)
    drawn[-1].caption = "Times are min / median of the rounds."
    return drawn


def draw(measured: Sequence[Measured], figure: Figure) -> None:
    """Time and memory of every variant, the plain step being 1."""
    from .._look import QUIET
    from ._plot import bars

    figure.set_size_inches(12.5, 11.0)
    panels = figure.subplots(3, 1)
    labels = [label for label in measured[0].times if label != PLAIN]

    def to_plain(quantity: Callable[[Measured, str], float]) -> dict[str, list[float]]:
        return {
            label: [quantity(one, label) / quantity(one, PLAIN) for one in measured]
            for label in labels
        }

    def held(one: Measured, label: str) -> float:
        return float(one.memory[label].held)

    def peak(one: Measured, label: str) -> float:
        return float(one.memory[label].peak)

    times = {label: [one.ratio(label, PLAIN, "median") for one in measured] for label in labels}
    steps = [one.step_s(PLAIN, "median") for one in measured]
    under = [
        f"{short(1e3 * step)} ms, {one.shape.tokens / step:,.0f} tokens/s"
        for one, step in zip(measured, steps, strict=True)
    ]
    series = [
        ("Time of a training step, without checkpointing = 1", times, under),
        (
            "Tensors held for backward, without checkpointing = 1",
            to_plain(held),
            [f"{held(one, PLAIN) / 2**20:.1f} MiB" for one in measured],
        ),
        (
            "Peak of tensors in a step, gradients included, without checkpointing = 1",
            to_plain(peak),
            [f"{peak(one, PLAIN) / 2**20:.1f} MiB" for one in measured],
        ),
    ]
    for axes, (title, values, notes) in zip(panels, series, strict=True):
        names = [
            f"{one.shape.name}\nplain {note}" for one, note in zip(measured, notes, strict=True)
        ]
        bars(axes, names, values, "{:.3f}".format)
        axes.set_title(title)
        axes.axhline(1, color=QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=0.5)
        axes.margins(x=0.02, y=0.14)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)


def run(screen: Screen, options: Options, functions: Functions) -> Report:
    """Checks and measures all shapes."""
    # Read when cuBLAS is first used: without it no matrix product is promised to be the same twice.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    chosen = shapes(options.quick, options.device)
    programs = [training(shape, options.device) for shape in chosen]
    require_equal_gradients([name for one in programs for name in differing(one, functions)])
    measured = []
    with screen.progress("rounds", options.rounds * len(programs)) as bar:
        for shape, program in zip(chosen, programs, strict=True):
            note = partial(bar.step, shape.name)
            measured.append(measure(program, shape, functions, options, note))
    remarks = []
    for form in FORMS:
        worst = [
            max(one.ratio(f"ours, {form}", f"torch, {form}", statistic) for one in measured)
            for statistic in STATISTICS
        ]
        remarks.append(
            f"{form}: ours / torch is at most {worst[0]:.3f} by minima, {worst[1]:.3f} by medians"
        )
    return Report(
        tables(measured),
        COLUMNS,
        lines(measured),
        remarks=remarks,
        draw=partial(draw, measured),
    )


def main(argv: Sequence[str] | None = None, functions: Functions | None = None) -> int:
    """Runs the benchmark: arguments and result as those of ``overhead.main``."""
    return COMMAND.run(argv, partial(run, functions=functions or implementations()))

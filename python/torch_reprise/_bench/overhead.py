"""What the bookkeeping of checkpointing costs, beside ``torch.utils.checkpoint``.

``python benchmarks/overhead.py [--rounds N] [--quick] [--csv FILE]``

Checkpointing has to repeat the forward; everything else that it adds to a step is bookkeeping:

    O = T(checkpointed step) - T(plain step) - T(one forward with gradients)

The figure that counts is O_ours / O_torch. Everything is timed in one process, on one thread, all
variants of a workload interleaved round by round, the garbage collector off inside a timed stretch.
``min`` takes the minimum of every T over the rounds, ``median`` the median of O over the rounds.
Before anything is timed, every variant has to give the gradients of the plain step, bit for bit.

Workloads:

* one operator: a chain of segments with one ``tanh`` on 4x4 each, 100 in one graph, so that the
  cost of starting a backward is shared by all of them. The figures are for one segment.
* 8 x (matmul, tanh) on 4x4: one segment with 24 saved tensors. The figures are for one segment,
  and the start of a backward is part of both steps.
* 12 GPT blocks of width 64 on a batch of 1x16, with dropout: one segment a block. The figures are
  for a step of all 12.

The reentrant form, torch's and ours, builds no graph in its first forward. The formula credits it
with that, so that its O can be below zero where building the graph costs more than the bookkeeping.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from .._demo.model import Block
from ._common import (
    Overheads,
    Screen,
    Summary,
    Table,
    measure_overheads,
    missing,
    torch_threads,
    write_csv,
)

# Runs one segment: ``segment(function, input)`` gives what ``function(input)`` gives.
Segment = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]

FORMS = ("non-reentrant", "reentrant")
STATISTICS = ("min", "median")
COLUMNS = (
    "workload",
    "form",
    "statistic",
    "segments",
    "rounds",
    "inner",
    "plain_us",
    "forward_us",
    "torch_step_us",
    "ours_step_us",
    "torch_overhead_us",
    "ours_overhead_us",
    "ratio",
)


def plainly(function: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """Runs a segment without checkpointing."""
    return function(value)


def implementations() -> dict[str, dict[str, Segment]]:
    """Checkpoint functions by form and name: ``torch`` and ``ours`` in both forms."""
    import torch.utils.checkpoint

    import torch_reprise

    return {
        form: {
            "torch": partial(torch.utils.checkpoint.checkpoint, use_reentrant=form == "reentrant"),
            "ours": partial(torch_reprise.checkpoint, use_reentrant=form == "reentrant"),
        }
        for form in FORMS
    }


@dataclass(frozen=True)
class Workload:
    """One program to measure.

    Attributes:
        name: as it stands in the table.
        chain: the segments; each takes what the one before gave.
        leaves: the input first, then the parameters; a step leaves its gradients there.
        per: what a figure is for, "segment" or "step".
    """

    name: str
    chain: Sequence[Callable[[Tensor], Tensor]]
    leaves: Sequence[Tensor]
    per: str

    @property
    def divisor(self) -> int:
        return len(self.chain) if self.per == "segment" else 1

    def forward(self, segment: Segment = plainly) -> Tensor:
        value = self.leaves[0]
        for function in self.chain:
            value = segment(function, value)
        return value

    def step(self, segment: Segment = plainly) -> None:
        torch.autograd.backward(self.forward(segment).sum())

    def gradients(self, segment: Segment) -> list[Tensor]:
        """Gradients of one step from a fixed seed; the random state is put back."""
        self.drop_gradients()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.step(segment)
        result = [leaf.grad for leaf in self.leaves if leaf.grad is not None]
        self.drop_gradients()
        return result

    def drop_gradients(self) -> None:
        """Steps add to the gradients in place; called before they grow out of range."""
        for leaf in self.leaves:
            leaf.grad = None


def one_operator(segments: int) -> Workload:
    value = torch.randn(4, 4, requires_grad=True)
    return Workload("one operator, tanh 4x4", [torch.tanh] * segments, [value], "segment")


def matmul_tanh() -> Workload:
    weights = [torch.randn(4, 4, requires_grad=True) for _ in range(8)]

    def layers(value: Tensor) -> Tensor:
        for weight in weights:
            value = torch.tanh(value @ weight)
        return value

    value = torch.randn(4, 4, requires_grad=True)
    return Workload("8 x (matmul, tanh) 4x4", [layers], [value, *weights], "segment")


def gpt_blocks(blocks: int) -> Workload:
    chain: list[nn.Module] = [Block(width=64, heads=4, dropout=0.1) for _ in range(blocks)]
    parameters = [parameter for block in chain for parameter in block.parameters()]
    hidden = torch.randn(1, 16, 64, requires_grad=True)
    return Workload(f"{blocks} GPT blocks, width 64", chain, [hidden, *parameters], "step")


def workloads() -> list[Workload]:
    """All workloads, their tensors drawn from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [one_operator(100), matmul_tanh(), gpt_blocks(12)]


def check(workload: Workload, functions: dict[str, dict[str, Segment]]) -> list[str]:
    """Names the variants whose gradients are not those of the plain step, bit for bit."""
    expected = workload.gradients(plainly)
    wrong = []
    for form, by_name in functions.items():
        for name, segment in by_name.items():
            found = workload.gradients(segment)
            same = len(found) == len(expected) == len(workload.leaves)
            if not (same and all(map(torch.equal, found, expected))):
                wrong.append(f"{workload.name}: {name}, {form}")
    return wrong


def measure(
    workload: Workload,
    functions: dict[str, dict[str, Segment]],
    *,
    rounds: int,
    target_s: float,
    on_round: Callable[[], object] = lambda: None,
) -> Overheads:
    """Times all forms of all functions on one workload, named ``"name, form"``."""

    def after_round() -> None:
        workload.drop_gradients()
        on_round()

    with torch.random.fork_rng(devices=[]):
        result = measure_overheads(
            workload.step,
            workload.forward,
            {
                f"{name}, {form}": partial(workload.step, segment)
                for form, by_name in functions.items()
                for name, segment in by_name.items()
            },
            rounds=rounds,
            target_s=target_s,
            after_round=after_round,
        )
    workload.drop_gradients()
    return result


def rows(workload: Workload, result: Overheads) -> list[list[object]]:
    """One row for each form and statistic, in the order of ``COLUMNS``; times in microseconds."""
    per = 1e6 / workload.divisor
    lines: list[list[object]] = []
    for form in FORMS:
        theirs, ours = f"torch, {form}", f"ours, {form}"
        series = (result.plain, result.forward, result.steps[theirs], result.steps[ours])
        summaries = [*map(Summary.of, series), result.of(theirs), result.of(ours)]
        for statistic in STATISTICS:
            figures = [per * getattr(summary, statistic) for summary in summaries]
            # Noise can make a small overhead negative; a ratio to that would be no figure.
            ratio: object = figures[-1] / figures[-2] if figures[-2] > 0 else ""
            head = [workload.name, form, statistic, len(workload.chain)]
            lines.append([*head, result.rounds, result.inner, *figures, ratio])
    return lines


def _short(value: object) -> str:
    """A figure with about three digits."""
    if not isinstance(value, float):
        return "-"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}"


def table(programs: Sequence[Workload], lines: Sequence[Sequence[object]]) -> Table:
    """The table for people: one row for each workload and form, a cell is ``min / median``."""
    found = {tuple(line[:3]): dict(zip(COLUMNS, line, strict=True)) for line in lines}
    drawn = Table(
        "O = step - plain step - one forward, in microseconds (min / median of the rounds)",
        ("workload", "form", "plain step", "O torch", "O ours", "ours / torch"),
    )

    def cell(workload: str, form: str, column: str) -> str:
        values = [found[workload, form, statistic][column] for statistic in STATISTICS]
        return " / ".join(_short(value) for value in values)

    for program in programs:
        for form in FORMS:
            first = form == FORMS[0]
            drawn.add(
                program.name if first else f"  per {program.per}",
                form,
                cell(program.name, form, "plain_us"),
                cell(program.name, form, "torch_overhead_us"),
                cell(program.name, form, "ours_overhead_us"),
                cell(program.name, form, "ratio"),
            )
    return drawn


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="overhead",
        description="Bookkeeping of checkpointing beside torch.utils.checkpoint.",
    )
    parser.add_argument("--rounds", type=int, default=25, help="15 or more (%(default)s)")
    parser.add_argument("--csv", type=Path, help="also write all figures to this file")
    parser.add_argument(
        "--quick", action="store_true", help="3 short rounds: shows that it runs, not how fast"
    )
    options = parser.parse_args(argv)
    if options.rounds < 15:
        parser.error(f"--rounds must be at least 15, got {options.rounds}; or use --quick")
    return options


def main(
    argv: Sequence[str] | None = None, functions: dict[str, dict[str, Segment]] | None = None
) -> int:
    """Runs the benchmark.

    Args:
        argv: command line without the program's name; None takes the process's own.
        functions: what to measure in place of ``implementations()``, with the same names.

    Returns:
        0; 1 if a variant gives other gradients than the plain step; 2 if it cannot run.
    """
    options = parse(argv)
    absent = missing("rich")
    if absent is not None:
        print(f"overhead: {absent}", file=sys.stderr)
        return 2
    rounds, target_s = (3, 0.002) if options.quick else (options.rounds, 0.02)
    chosen = implementations() if functions is None else functions
    screen = Screen()
    with torch_threads(1):
        screen.facts()
        programs = workloads()
        wrong = [name for workload in programs for name in check(workload, chosen)]
        if wrong:
            for name in wrong:
                screen.line(f"gradients differ from the plain step's: {name}", style="bold red")
            return 1
        lines = []
        with screen.progress("rounds", rounds * len(programs)) as bar:
            for workload in programs:
                note = partial(bar.step, workload.name)
                result = measure(workload, chosen, rounds=rounds, target_s=target_s, on_round=note)
                lines += rows(workload, result)
    screen.table(table(programs, lines))
    if options.quick:
        screen.line("--quick: too few and too short rounds for figures to be quoted.")
    if options.csv is not None:
        write_csv(options.csv, COLUMNS, lines)
        screen.line(f"CSV: {options.csv}")
    return 0

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

Beside them stands O of a step whose backward calls each function once more, by a tensor hook, and
keeps nothing: what is left of O where there is no bookkeeping. Where ``torch_remat`` is installed,
it is measured in the same rounds, with a hook that keeps the state of the CPU's generator; it has
no reentrant form.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from .._demo.model import Block
from ._command import Command, Options, Report, require_equal_gradients
from ._common import Overheads, Screen, Summary, Table, short
from ._programs import (
    AGAIN,
    FORMS,
    REMAT,
    STATISTICS,
    Functions,
    Workload,
    called_again,
    check,
    implementations,
    matmul_tanh,
    measure,
    one_operator,
    remat,
)

# The third workload's O is a small part of its steps: short stretches let a lucky one of the plain
# step decide over the minimum.
COMMAND = Command(
    "overhead",
    "Bookkeeping of checkpointing beside torch.utils.checkpoint.",
    draws=False,
    target_s=0.1,
)
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
    "remat_overhead_us",
    "again_overhead_us",
)
# By the names of the functions: columns for what is measured in one form, or not everywhere.
OTHERS = {REMAT: "remat_overhead_us", AGAIN: "again_overhead_us"}


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
            others: list[object] = [
                per * getattr(result.of(f"{name}, {form}"), statistic)
                if f"{name}, {form}" in result.steps
                else ""
                for name in OTHERS
            ]
            head = [workload.name, form, statistic, len(workload.chain)]
            lines.append([*head, result.rounds, result.inner, *figures, ratio, *others])
    return lines


def table(programs: Sequence[Workload], lines: Sequence[Sequence[object]]) -> Table:
    """The table for people: one row for each workload and form, a cell is ``min / median``."""
    found = {tuple(line[:3]): dict(zip(COLUMNS, line, strict=True)) for line in lines}
    others = [
        (name, column)
        for name, column in OTHERS.items()
        if any(line[column] != "" for line in found.values())
    ]
    drawn = Table(
        "O = step - plain step - one forward, in microseconds (min / median of the rounds)",
        (
            *("workload", "form", "plain step", "O torch"),
            *(f"O {name}" for name, _ in others),
            *("O ours", "ours / torch"),
        ),
    )

    def cell(workload: str, form: str, column: str) -> str:
        values = [found[workload, form, statistic][column] for statistic in STATISTICS]
        if column in OTHERS.values() and "" in values:
            return ""  # not measured in this form
        return " / ".join(short(value) for value in values)

    for program in programs:
        for form in FORMS:
            first = form == FORMS[0]
            drawn.add(
                program.name if first else f"  per {program.per}",
                form,
                cell(program.name, form, "plain_us"),
                cell(program.name, form, "torch_overhead_us"),
                *(cell(program.name, form, column) for _, column in others),
                cell(program.name, form, "ours_overhead_us"),
                cell(program.name, form, "ratio"),
            )
    return drawn


def run(screen: Screen, options: Options, functions: Functions) -> Report:
    """Checks and measures all workloads."""
    programs = workloads()
    require_equal_gradients([name for program in programs for name in check(program, functions)])
    lines = []
    with screen.progress("rounds", options.rounds * len(programs)) as bar:
        for program in programs:
            result = measure(
                program,
                functions,
                rounds=options.rounds,
                target_s=options.target_s,
                on_round=partial(bar.step, program.name),
            )
            lines += rows(program, result)
    return Report([table(programs, lines)], COLUMNS, lines)


def main(argv: Sequence[str] | None = None, functions: Functions | None = None) -> int:
    """Runs the benchmark.

    Args:
        argv: command line without the program's name; None takes the process's own.
        functions: what to measure in place of ``implementations()``, with the same names.

    Returns:
        0; 1 if a variant gives other gradients than the plain step; 2 if it cannot run.
    """
    if functions is None:
        functions = implementations()
        functions["non-reentrant"].update(remat(), **{AGAIN: called_again()})
    return COMMAND.run(argv, partial(run, functions=functions))

"""What selective checkpointing costs, beside ``torch.utils.checkpoint``.

``python benchmarks/selective.py [--rounds N] [--quick] [--csv FILE]``

The contexts are torch's own (``create_selective_checkpoint_contexts``), in both libraries: a
dispatch mode that asks a policy, in Python, about each operator of forward and replay. What is left
of the difference is the segment around it. Policies on the blocks of a GPT:

* save the products: the outputs of matrix multiplications and of attention are kept
* save nothing: everything is recomputed; the price of asking alone
* save attention: the most expensive operator alone

A figure is a step's time beyond that of a plain step, ``step - plain``: how much is recomputed
depends on the policy, so that there is no forward to take off. Before anything is timed, every
variant has to give the gradients of the plain step, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from ..checkpoint import checkpoint
from ._command import Command, Options, Report, require_equal_gradients
from ._common import Screen, Summary, Table, calibrate, interleave, short
from ._programs import PLAIN, STATISTICS, Segment, check, plainly
from .overhead import gpt_blocks

COLUMNS = ("policy", "variant", "statistic", "rounds", "inner", "step_us", "added_us", "ratio")
COMMAND = Command(
    "selective",
    "Cost of selective checkpointing beside torch.utils.checkpoint.",
    draws=False,
)
BLOCKS = 12


def _saves(names: tuple[str, ...], ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> Any:
    saved = operator.__name__.lstrip("_").startswith(names)
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


POLICIES: dict[str, Callable[..., Any]] = {
    "save the products": partial(_saves, ("mm", "addmm", "bmm", "scaled_dot_product")),
    "save attention": partial(_saves, ("scaled_dot_product",)),
    "save nothing": partial(_saves, ("nothing",)),
}


def functions(policy: Callable[..., Any]) -> dict[str, Segment]:
    contexts = partial(create_selective_checkpoint_contexts, policy)
    return {
        "torch": partial(torch_checkpoint.checkpoint, use_reentrant=False, context_fn=contexts),
        "ours": partial(checkpoint, use_reentrant=False, context_fn=contexts),
    }


def run(screen: Screen, options: Options) -> Report:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        workload = gpt_blocks(BLOCKS)
    lines: list[list[object]] = []
    table = Table(
        f"{workload.name}: step - plain step, in microseconds (min / median of the rounds)",
        ("policy", "plain step", "torch", "ours", "ours / torch"),
    )
    with screen.progress("rounds", options.rounds * len(POLICIES)) as bar:
        for policy, asked in POLICIES.items():
            by_name = functions(asked)
            require_equal_gradients(check(workload, {policy: by_name}))
            thunks = {
                name: partial(workload.step, segment)
                for name, segment in {PLAIN: plainly, **by_name}.items()
            }

            def after(policy: str = policy) -> None:
                workload.drop_gradients()
                bar.step(policy)

            with torch.random.fork_rng(devices=[]):
                inner = calibrate(thunks[PLAIN], options.target_s)
                times = interleave(thunks, rounds=options.rounds, inner=inner, after_round=after)
            in_us = {name: [t * 1e6 for t in series] for name, series in times.items()}
            added = {
                name: Summary.of_difference(in_us[name], in_us[PLAIN]) for name in ("torch", "ours")
            }
            for name, series in in_us.items():
                step = Summary.of(series)
                for statistic in STATISTICS:
                    extra: list[object] = ["", ""]
                    if name in added:
                        figure = getattr(added[name], statistic)
                        base = getattr(added["torch"], statistic)
                        extra = [figure, figure / base if base > 0 else ""]
                    lines.append(
                        [
                            policy,
                            name,
                            statistic,
                            options.rounds,
                            inner,
                            getattr(step, statistic),
                            *extra,
                        ]
                    )
            ratios = [
                getattr(added["ours"], s) / getattr(added["torch"], s)
                if getattr(added["torch"], s) > 0
                else ""
                for s in STATISTICS
            ]
            plain_step = Summary.of([t * 1e6 for t in times[PLAIN]])
            table.add(
                policy,
                *(
                    " / ".join(short(value) for value in pair)
                    for pair in (
                        (plain_step.min, plain_step.median),
                        (added["torch"].min, added["torch"].median),
                        (added["ours"].min, added["ours"].median),
                        ratios,
                    )
                ),
            )
    return Report([table], COLUMNS, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; see ``Command.run`` for the exit status."""
    return COMMAND.run(argv, run)

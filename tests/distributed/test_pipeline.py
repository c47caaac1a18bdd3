"""Pipeline schedules over two ranks with checkpointed blocks.

Schedules of the zero bubble kind split a backward into one call for the gradients of the inputs
(dx) and a later one for those of the weights (dw). Each of them needs what the segment dropped:
without a `GraphExecGroup` it is replayed for each, with one around the step it is replayed once.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import Run, both_forms, checkpointed, grads, plain
from models import (
    WIDTH,
    Block,
    batch,
    descend,
    differs_between_ranks,
    exact,
    same_on_all_ranks,
    state_of,
)
from ranks import on_each_rank
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining._backward import (
    stage_backward_input,
    stage_backward_weight,
)
from torch.distributed.pipelining.schedules import PipelineScheduleMulti
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from torch_reprise import GraphExecGroup

MICRO = 4
"""Micro batches of `ROWS` rows in a step."""
ROWS = 2
STEPS = 2
BLOCKS = 2
"""Blocks, each a segment, in a stage."""


class Stage(nn.Module):
    """A layer and segments after it, so that a segment's input requires grad in all stages."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = self.run(block, x)
        return x


def squared_error(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).square().sum()


def stages_of(schedule: type) -> list[int]:
    """Which stages lie on this rank."""
    rank = dist.get_rank()
    if issubclass(schedule, ScheduleZBVZeroBubble):
        return [rank, 3 - rank]
    if issubclass(schedule, PipelineScheduleMulti):
        return [rank, rank + 2]
    return [rank]


def stage(module: nn.Module, index: int, total: int, static: bool) -> PipelineStage:
    """With `static`, the stage is told what it gets and gives, and need not try it out."""
    known: dict[str, Any] = {}
    if static:
        rows = torch.empty(ROWS, WIDTH)
        known["input_args"] = rows.clone().requires_grad_(index > 0)
        known["output_args"] = rows.clone().requires_grad_()
    return PipelineStage(module, index, total, torch.device("cpu"), **known)


def train_pipeline(run: Run, schedule: type, *, group: bool = False, static: bool = True) -> Any:
    same_on_all_ranks()
    indices = stages_of(schedule)
    total = 2 * len(indices)
    modules = [Stage(run) for _ in range(total)]
    stages = [stage(modules[i], i, total, static) for i in indices]
    whole_or_list = stages if issubclass(schedule, PipelineScheduleMulti) else stages[0]
    plan = schedule(whole_or_list, MICRO, loss_fn=squared_error)
    x, target = torch.randn(2, MICRO * ROWS, WIDTH).unbind()
    differs_between_ranks()
    rows = []
    for _ in range(STEPS):
        losses: list[Tensor] = []
        inputs = (x,) if 0 in indices else ()
        last = {"target": target, "losses": losses} if total - 1 in indices else {}
        with GraphExecGroup() if group and run is not plain else nullcontext():
            y = plan.step(*inputs, **last)
        here = nn.ModuleList(modules[i] for i in indices)
        rows.append([y, losses, state_of(here)])
        descend(here)
        here.zero_grad()
    return rows


def segments(schedule: type) -> int:
    return STEPS * MICRO * BLOCKS * len(stages_of(schedule))


WHOLE = [ScheduleGPipe, Schedule1F1B, ScheduleInterleaved1F1B, ScheduleLoopedBFS]
SPLIT = [ScheduleInterleavedZeroBubble, ScheduleZBVZeroBubble]


@both_forms
@pytest.mark.parametrize("schedule", WHOLE)
@on_each_rank
def test_a_schedule_with_whole_backwards_is_exact(schedule: type, use_reentrant: bool) -> None:
    exact(
        lambda run: train_pipeline(run, schedule),
        replays=segments(schedule),
        use_reentrant=use_reentrant,
    )


@pytest.mark.parametrize("schedule", [*WHOLE, *SPLIT])
@on_each_rank
def test_every_segment_is_replayed_once_in_a_group(schedule: type) -> None:
    exact(lambda run: train_pipeline(run, schedule, group=True), replays=segments(schedule))


@pytest.mark.parametrize("schedule", SPLIT)
@on_each_rank
def test_without_a_group_dx_replays_and_each_part_of_dw_replays_again(schedule: type) -> None:
    """torch asks for dw by one call for each operator that has weights: three of them in a block.

    Stage 0 has no dx, and its dw is one whole backward.
    """
    first = STEPS * MICRO * BLOCKS if 0 in stages_of(schedule) else 0
    split = segments(schedule) - first
    exact(lambda run: train_pipeline(run, schedule), replays=first + (1 + 3) * split)


@pytest.mark.parametrize("schedule", [*WHOLE, *SPLIT])
@on_each_rank
def test_stages_that_try_out_their_shapes_first(schedule: type) -> None:
    """The default: a forward in all stages, and a backward in all but stage 0, replays included."""
    tried = BLOCKS * sum(index > 0 for index in stages_of(schedule))
    exact(
        lambda run: train_pipeline(run, schedule, group=True, static=False),
        replays=segments(schedule) + tried,
    )


@on_each_rank
def test_the_reentrant_form_gives_dx_and_never_dw_of_what_is_inside() -> None:
    """Its graph ends at the arguments, so torch's split finds no weights in it, and says nothing.

    torch's own reentrant form refuses dx.
    """

    def split(run: Run) -> tuple[Any, list[Tensor | None]]:
        same_on_all_ranks()
        model = Stage(run)
        for block in model.blocks:
            block.drop.p = 0.0
        x = batch(ROWS, WIDTH)
        y = model(x)
        dx, groups = stage_backward_input([y], [torch.ones_like(y)], [x], model.parameters())
        stage_backward_weight(model.parameters(), groups)
        return dx, grads(model)

    dx, dw = split(plain)
    found, weights = split(checkpointed(use_reentrant=True))
    assert torch.equal(found[0], dx[0])
    assert all(torch.equal(w, v) for w, v in zip(weights[:2], dw[:2], strict=True))
    assert weights[2:] == [None] * (len(dw) - 2) and None not in dw
    torchs = partial(torch_checkpoint, use_reentrant=True)
    with pytest.raises(RuntimeError, match="Failed to run stage backward input"):
        split(torchs)


@on_each_rank
def test_dx_and_dw_called_by_hand_in_groups_of_their_micro_batch() -> None:
    """Groups that end with their micro batch: nothing is kept for longer than from dx to dw."""

    def program(run: Run) -> Any:
        same_on_all_ranks()
        model = Stage(run)
        differs_between_ranks()
        inputs = [batch(ROWS, WIDTH) for _ in range(MICRO)]
        outputs = [model(x) for x in inputs]
        rows = []
        for x, y in zip(inputs, outputs, strict=True):
            with GraphExecGroup() if run is not plain else nullcontext():
                ones = [torch.ones_like(y)]
                dx, groups = stage_backward_input([y], ones, [x], model.parameters())
                stage_backward_weight(model.parameters(), groups)
            rows.append([dx, state_of(model)])
        return rows

    exact(program, replays=MICRO * BLOCKS)

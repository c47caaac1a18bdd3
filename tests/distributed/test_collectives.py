"""Collectives that the checkpointed function itself calls: a replay calls them again.

All ranks replay in the order in which their graphs ask, which is the same order if the graphs are
the same. Where the graphs differ, the point at which a replay may stop differs too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import Run, both_forms, checkpointed
from models import WIDTH, Block, Net, batch, differs_between_ranks, exact, same_on_all_ranks, train
from ranks import on_each_rank
from torch import Tensor, nn
from torch.distributed import _functional_collectives as functional
from torch.nn.parallel import DistributedDataParallel


class AllReduce(torch.autograd.Function):
    """The sum over all ranks, in forward and in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return AllReduce.forward(ctx, grad)


class SyncedNorm(nn.Module):
    """Batch norm over the batches of all ranks: collectives in forward and in backward.

    torch's SyncBatchNorm takes CUDA tensors only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.running: Tensor
        self.register_buffer("running", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        sums = torch.stack([x.sum(0), x.square().sum(0), torch.full((WIDTH,), float(len(x)))])
        total, squares, count = AllReduce.apply(sums).unbind()
        mean = total / count
        with torch.no_grad():
            self.running.lerp_(mean, 0.1)
        scale = (squares / count - mean.square() + 1e-5).rsqrt()
        return (x - mean) * scale * self.weight


@both_forms
@on_each_rank
def test_batch_norm_that_is_synchronised(use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        same_on_all_ranks()
        parts = [nn.Sequential(SyncedNorm(), Block()) for _ in range(2)]
        return train(DistributedDataParallel(Net(run, parts)), steps=2)

    exact(program, replays=2 * 2, use_reentrant=use_reentrant)


@on_each_rank
def test_torch_refuses_its_synchronised_batch_norm_on_the_cpu() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm1d(WIDTH))
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on"):
        model(batch())


class Experts(nn.Module):
    """An expert on each rank: rows go to it and come back by collectives that do not wait."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        there = functional.all_to_all_single_autograd(x, None, None, dist.group.WORLD)
        h = torch.tanh(self.expert(there))
        back = functional.all_to_all_single_autograd(h, None, None, dist.group.WORLD)
        return x + back


@both_forms
@pytest.mark.parametrize("determinism_check", ["default", "bitwise"])
@on_each_rank
def test_collectives_that_do_not_wait(use_reentrant: bool, determinism_check: str) -> None:
    """Their results are a subclass that waits when somebody looks."""

    def program(run: Run) -> Any:
        torch.manual_seed(dist.get_rank())  # an expert of its own
        return train(Net(run, [Experts(), Experts()]), steps=2)

    exact(
        program,
        replays=2 * 2,
        use_reentrant=use_reentrant,
        determinism_check=determinism_check,
    )


class Counting:
    """A statistic over all ranks between what backward needs on all and what it needs on some."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        always = x.sin()
        self.calls += 1  # here would be a collective
        return always, always.exp().sin()


def calls_where_the_second_output_is_dropped(early_stop: bool) -> int:
    function = Counting()
    x = batch()
    y, _ = checkpointed(early_stop=early_stop)(function, x)
    del _
    y.sum().backward()
    return function.calls


def test_without_other_processes_a_replay_stops_at_what_this_backward_needs() -> None:
    assert not dist.is_initialized()
    assert calls_where_the_second_output_is_dropped(early_stop=True) == 1
    assert calls_where_the_second_output_is_dropped(early_stop=False) == 2


@on_each_rank
def test_with_others_a_replay_goes_on_to_where_theirs_may_go() -> None:
    assert calls_where_the_second_output_is_dropped(early_stop=True) == 2


@pytest.mark.parametrize("early_stop", [True, False])
@on_each_rank
def test_ranks_whose_graphs_differ_meet_in_collectives(early_stop: bool) -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        always = x.sin()
        with torch.no_grad():
            total = always.sum()
            dist.all_reduce(total)
        return always, (always * total).sin()

    def program(run: Run) -> Any:
        differs_between_ranks()
        x = batch()
        y, z = run(function, x)
        if dist.get_rank() == 0:
            y = y + z
        del z
        y.sum().backward()
        return [y, x.grad]

    exact(program, replays=1, early_stop=early_stop)

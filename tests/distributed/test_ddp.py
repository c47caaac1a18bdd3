"""DistributedDataParallel over checkpointed blocks: the bits of DDP without checkpointing.

DDP hangs hooks on the accumulators of the parameters, queues a callback on the engine (which is
ours) and, with `find_unused_parameters`, walks the graph that the forward made.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import Run, both_forms, checkpointed, message_of, plain
from models import (
    WIDTH,
    Block,
    Net,
    batch,
    descend,
    differs_between_ranks,
    exact,
    same_on_all_ranks,
    state_of,
    train,
)
from ranks import on_each_rank
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as torch_checkpoint

BLOCKS = 3


def blocks(count: int = BLOCKS) -> list[Block]:
    return [Block() for _ in range(count)]


def wrapped(run: Run, parts: list[nn.Module], **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(Net(run, parts), **options)


# The reentrant form hides the parameters of a block from the graph that DDP walks: torch supports
# it with static_graph=True, or where nothing is searched and every parameter is used once.
SETUPS = {
    "default": {},
    "bucket view": {"gradient_as_bucket_view": True},
    "small buckets": {"bucket_cap_mb": 0.0001},
    "static": {"static_graph": True},
    "static bucket view": {"static_graph": True, "gradient_as_bucket_view": True},
}


@both_forms
@pytest.mark.parametrize("setup", SETUPS)
@on_each_rank
def test_a_step_with_ddp_is_exact(setup: str, use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        same_on_all_ranks()
        return train(wrapped(run, [*blocks()], **SETUPS[setup]), steps=3)

    exact(program, replays=3 * BLOCKS, use_reentrant=use_reentrant)


class Sometimes(nn.Module):
    """Uses one of two layers, which one differs between ranks and steps."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(WIDTH, WIDTH)
        self.right = nn.Linear(WIDTH, WIDTH)
        self.steps = 0

    def forward(self, x: Tensor, step: int) -> Tensor:
        layer = self.left if (step + dist.get_rank()) % 2 else self.right
        return torch.tanh(layer(x))


@pytest.mark.parametrize("bucket_view", [False, True])
@on_each_rank
def test_unused_parameters_of_segments_are_found(bucket_view: bool) -> None:
    """Another layer on each rank, so each gradient is the average of one rank's and nothing."""

    def program(run: Run) -> Any:
        same_on_all_ranks()
        model = wrapped(
            run,
            [Sometimes(), Sometimes()],
            find_unused_parameters=True,
            gradient_as_bucket_view=bucket_view,
        )
        return [train(model, steps=1, step=i) for i in range(3)]

    exact(program, replays=3 * 2)


@both_forms
@on_each_rank
def test_accumulation_without_synchronisation_is_exact(use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        same_on_all_ranks()
        model = wrapped(run, [*blocks()])
        differs_between_ranks()
        seen = []
        for _ in range(2):
            with model.no_sync():
                for _ in range(2):
                    model(batch()).sum().backward()
                    seen.append(state_of(model))  # gradients of this rank alone
            model(batch()).sum().backward()
            seen.append(state_of(model))
            descend(model)
            model.zero_grad()
        return seen

    exact(program, replays=2 * 3 * BLOCKS, use_reentrant=use_reentrant)


@both_forms
@on_each_rank
def test_two_forwards_before_their_backwards_with_batch_norm(use_reentrant: bool) -> None:
    """DDP copies the buffers of rank 0 to all ranks before each forward, in place."""

    def program(run: Run) -> Any:
        same_on_all_ranks()
        parts = [nn.Sequential(nn.BatchNorm1d(WIDTH), Block()) for _ in range(2)]
        model = wrapped(run, parts)
        differs_between_ranks()
        with model.no_sync():
            first = model(batch())
            second = model(batch())
            after_forward = state_of(model)
            (first * second).sum().backward()
        third = model(batch())
        third.sum().backward()
        return [first, second, third, after_forward, state_of(model)]

    exact(program, replays=3 * 2, use_reentrant=use_reentrant)


@on_each_rank
def test_torch_refuses_its_synchronised_batch_norm_on_the_cpu() -> None:
    same_on_all_ranks()
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm1d(WIDTH))
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on"):
        model(batch())


@both_forms
@on_each_rank
def test_a_parameter_shared_by_segments_with_a_static_graph(use_reentrant: bool) -> None:
    """The reentrant form gives DDP its gradient in two portions, which static_graph counts."""

    def program(run: Run) -> Any:
        same_on_all_ranks()
        one, other = blocks(2)
        other.up.weight = one.up.weight
        return train(wrapped(run, [one, other, one], static_graph=True), steps=3)

    exact(program, replays=3 * 3, use_reentrant=use_reentrant)


@on_each_rank
def test_a_parameter_shared_by_segments_without_a_static_graph() -> None:
    def program(run: Run) -> Any:
        same_on_all_ranks()
        one, other = blocks(2)
        other.up.weight = one.up.weight
        return train(wrapped(run, [one, other, one]), steps=3)

    exact(program, replays=3 * 3)


@both_forms
@on_each_rank
def test_ddp_inside_of_a_segment(use_reentrant: bool) -> None:
    """Each replay runs DDP's forward again, which begins a new round of its buckets."""

    def program(run: Run) -> Any:
        same_on_all_ranks()
        model = DistributedDataParallel(nn.Sequential(*blocks(2)))
        return train(Net(run, [model]), steps=2)

    exact(program, replays=2, use_reentrant=use_reentrant)


@both_forms
@on_each_rank
def test_a_communication_hook_sees_the_same_buckets(use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        same_on_all_ranks()
        model = wrapped(run, [*blocks()], bucket_cap_mb=0.001)
        sizes: list[int] = []

        def hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP takes no quoted types
            sizes.append(bucket.buffer().numel())
            return fp16_compress_hook(state, bucket)

        model.register_comm_hook(None, hook)
        rows = train(model, steps=2)
        assert len(sizes) > 2
        return [rows, sizes]

    exact(program, replays=2 * BLOCKS, use_reentrant=use_reentrant)


@both_forms
@on_each_rank
def test_ranks_with_fewer_batches_join(use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        same_on_all_ranks()
        model = wrapped(run, [*blocks()])
        with model.join():
            return train(model, steps=1 + dist.get_rank())

    exact(program, replays=(1 + dist.get_rank()) * BLOCKS, use_reentrant=use_reentrant)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it can")
@on_each_rank
def test_torch_cannot_step_the_optimizer_during_the_backward_of_ddp_on_the_cpu() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the import scripts functions, which torch deprecates
        from torch.distributed.optim import _apply_optimizer_in_backward
    net = Net(plain, [*blocks()])
    _apply_optimizer_in_backward(torch.optim.SGD, net.parameters(), {"lr": 0.05})
    model = DistributedDataParallel(net)
    # A build with CUDA asks the driver instead.
    with pytest.raises(RuntimeError, match="Cannot access accelerator device|CUDA error"):
        model(batch()).sum().backward()


@both_forms
@on_each_rank
def test_autocast_around_ddp(use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        same_on_all_ranks()
        model = wrapped(run, [*blocks()], static_graph=True)
        differs_between_ranks()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(batch())
        y.float().sum().backward()
        return [y, state_of(model)]

    exact(program, replays=BLOCKS, use_reentrant=use_reentrant)


def error_of(run: Run, parts: list[nn.Module], **options: Any) -> str:
    """What DDP says about it; the same on all ranks, so that none of them waits."""
    same_on_all_ranks()
    model = wrapped(run, parts, **options)
    return message_of(RuntimeError, lambda: train(model, steps=2))


REFUSED = {
    "unused parameters are searched": ({"find_unused_parameters": True}, False),
    "shared parameter": ({}, True),
}


@pytest.mark.parametrize("setup", REFUSED)
@on_each_rank(needs_gc=True)
def test_what_ddp_refuses_of_the_reentrant_form_it_refuses_of_ours(setup: str) -> None:
    options, shared = REFUSED[setup]

    def parts() -> list[nn.Module]:
        one, other = blocks(2)
        return [one, other, one] if shared else [one, other]

    ours = error_of(checkpointed(use_reentrant=True), parts(), **options)
    torchs = error_of(partial(torch_checkpoint, use_reentrant=True), parts(), **options)
    assert "mark a variable ready only once" in ours
    assert ours == torchs

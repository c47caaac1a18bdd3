"""FSDP2's `fully_shard` with segments inside of the sharded modules and around them.

Parameters are gathered before a module runs and let go of after it, so a replay has to have them
gathered again: by the module's own hooks if the segment lies around it, by its hook before backward
if the segment lies inside.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from helpers import Program, Run, assert_same_bits, both_forms, checkpointed, plain, play
from models import (
    WIDTH,
    Block,
    Net,
    batch,
    descend,
    differs_between_ranks,
    exact,
    in_parts,
    same_on_all_ranks,
    state_of,
    train,
)
from ranks import on_each_rank
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from torch_reprise import ledger

BLOCKS = 3


class Inside(nn.Module):
    """A sharded module that checkpoints a part of its own forward."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.first = nn.Linear(WIDTH, WIDTH)
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.run(self.block, x)


def sharded(run: Run, place: str, mesh: DeviceMesh | None = None, **options: Any) -> nn.Module:
    """A net whose blocks are sharded one by one, and then what is left of it."""
    mesh = mesh or init_device_mesh("cpu", (2,))
    same_on_all_ranks()
    if place == "inside":
        net = Net(plain, [Inside(run) for _ in range(BLOCKS)])
    else:
        net = Net(run, [Block() for _ in range(BLOCKS)])
    for block in net.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, **options)


places = pytest.mark.parametrize("place", ["inside", "around"])


@both_forms
@pytest.mark.parametrize("reshard", [True, False], ids=["reshard", "keep"])
@places
@on_each_rank
def test_a_step_of_a_sharded_net_is_exact(place: str, reshard: bool, use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        return train(sharded(run, place, reshard_after_forward=reshard), steps=3)

    exact(program, replays=3 * BLOCKS, use_reentrant=use_reentrant)


@both_forms
@places
@on_each_rank
def test_mixed_precision_of_sharded_modules(place: str, use_reentrant: bool) -> None:
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
    )

    def program(run: Run) -> Any:
        return train(sharded(run, place, mp_policy=policy), steps=2)

    exact(program, replays=2 * BLOCKS, use_reentrant=use_reentrant)


@both_forms
@places
@on_each_rank
def test_shards_that_are_replicated(place: str, use_reentrant: bool) -> None:
    """A mesh of two dimensions: gradients are summed over one of them."""

    def program(run: Run) -> Any:
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
        return train(sharded(run, place, mesh), steps=2)

    exact(program, replays=2 * BLOCKS, use_reentrant=use_reentrant)


@both_forms
@places
@on_each_rank
def test_parameters_that_are_offloaded(place: str, use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        policy = CPUOffloadPolicy(pin_memory=False)
        return train(sharded(run, place, offload_policy=policy), steps=2)

    exact(program, replays=2 * BLOCKS, use_reentrant=use_reentrant)


@both_forms
@pytest.mark.parametrize("reshard", [True, False], ids=["reshard", "keep"])
@places
@on_each_rank
def test_accumulation_over_micro_batches(place: str, reshard: bool, use_reentrant: bool) -> None:
    """Gradients are reduced, and with `keep` parameters let go of, in the last backward only."""

    def program(run: Run) -> Any:
        model = sharded(run, place, reshard_after_forward=reshard)
        differs_between_ranks()
        rows = []
        for last in (False, False, True):
            model.set_requires_gradient_sync(last)  # type: ignore[operator]
            model.set_is_last_backward(last)  # type: ignore[operator]
            model.set_reshard_after_backward(last or reshard)  # type: ignore[operator]
            x = batch()
            y = model(x)
            y.square().sum().backward()
            rows.append([y, x.grad])
        descend(model)
        return [rows, state_of(model)]

    exact(program, replays=3 * BLOCKS, use_reentrant=use_reentrant)


def two_forwards_before_one_backward(place: str) -> Program:
    def program(run: Run) -> Any:
        model = sharded(run, place)
        differs_between_ranks()
        first, second = model(batch()), model(batch())
        (first * second).sum().backward()
        return in_parts([first, second, state_of(model)])

    return program


@places
@on_each_rank
def test_two_forwards_before_one_backward_of_sharded_modules(place: str) -> None:
    exact(two_forwards_before_one_backward(place), replays=2 * BLOCKS)


@places
@on_each_rank
def test_two_forwards_before_one_backward_are_wrong_with_torchs_reentrant_form_too(
    place: str,
) -> None:
    """The inner backwards end the module's own: it reduces too early, or not at all."""
    program = two_forwards_before_one_backward(place)
    ours = play(program, checkpointed(use_reentrant=True))
    assert_same_bits(ours, play(program, partial(torch_checkpoint, use_reentrant=True)))
    with pytest.raises(AssertionError):
        assert_same_bits(ours, play(program, plain))


@both_forms
@on_each_rank
def test_prefetching_of_the_next_blocks(use_reentrant: bool) -> None:
    """Gathers of later blocks begin early, in a replay too; what is gathered has to be the same."""

    def program(run: Run) -> Any:
        model = sharded(run, "around")
        blocks = list(model.blocks)  # type: ignore[arg-type]
        for i, block in enumerate(blocks):
            block.set_modules_to_forward_prefetch(blocks[i + 1 : i + 3])
            block.set_modules_to_backward_prefetch(blocks[max(0, i - 2) : i][::-1])
        return train(model, steps=2)

    exact(program, replays=2 * BLOCKS, use_reentrant=use_reentrant)


@both_forms
@on_each_rank
def test_one_segment_around_several_sharded_modules(use_reentrant: bool) -> None:
    """The replay gathers the parameters of all three while the last one's backward waits."""

    def program(run: Run) -> Any:
        mesh = init_device_mesh("cpu", (2,))
        same_on_all_ranks()
        parts = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        net = Net(run, [parts])
        for block in parts:
            fully_shard(block, mesh=mesh)
        return train(fully_shard(net, mesh=mesh), steps=2)

    exact(program, replays=2, use_reentrant=use_reentrant)


@on_each_rank
def test_segments_in_segments_around_sharded_modules() -> None:
    def program(run: Run) -> Any:
        mesh = init_device_mesh("cpu", (2,))
        same_on_all_ranks()
        inner = Net(run, [Inside(run) for _ in range(2)])
        for block in inner.blocks:
            fully_shard(block, mesh=mesh)
        return train(fully_shard(Net(run, [inner]), mesh=mesh), steps=2)

    exact(program, replays=2 * (1 + 2 + 2))


@both_forms
@on_each_rank
def test_frozen_blocks_between_sharded_ones(use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        mesh = init_device_mesh("cpu", (2,))
        same_on_all_ranks()
        net = Net(run, [Block() for _ in range(BLOCKS)])
        net.blocks[1].requires_grad_(False)
        for block in net.blocks:
            fully_shard(block, mesh=mesh)
        return train(fully_shard(net, mesh=mesh), steps=2)

    exact(program, replays=2 * BLOCKS, use_reentrant=use_reentrant)


@both_forms
@places
@on_each_rank
def test_values_of_gathered_parameters_are_compared(place: str, use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        return train(sharded(run, place), steps=2)

    exact(program, replays=2 * BLOCKS, use_reentrant=use_reentrant, determinism_check="bitwise")


class Collectives(TorchDispatchMode):
    """Counts operators of torch.distributed."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reshard", [True, False], ids=["reshard", "keep"])
@places
@on_each_rank
def test_a_replay_of_a_block_gathers_no_parameters_of_its_own(place: str, reshard: bool) -> None:
    """FSDP gathers before a block's backward, and the replay comes after that."""

    def collectives(run: Run) -> Counter[str]:
        model = sharded(run, place, reshard_after_forward=reshard)
        train(model, steps=1)
        with Collectives() as seen:
            train(model, steps=1)
        return seen.counts

    before = ledger.replays()
    expected = collectives(plain)
    assert expected["c10d::_allgather_base_"] == (BLOCKS + 1) * (1 + reshard)
    for use_reentrant in (False, True):
        assert collectives(checkpointed(use_reentrant=use_reentrant)) == expected
    assert ledger.replays() == before + 2 * 2 * BLOCKS

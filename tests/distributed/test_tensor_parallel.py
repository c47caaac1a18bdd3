"""DTensors: tensor parallel blocks as segments, DTensors as their arguments.

A DTensor is a subclass whose operators are collectives as well. What a segment saves of it are
DTensors, and a replay makes them by the same collectives.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import Run, both_forms, checkpointed, message_of, plain
from models import (
    Block,
    Net,
    exact,
    in_parts,
    same_on_all_ranks,
    train,
)
from ranks import on_each_rank
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from torch_reprise import CheckpointError

BLOCKS = 2


def line() -> DeviceMesh:
    return init_device_mesh("cpu", (2,))


def parallel_block(drop: float) -> nn.Module:
    """Two matrices cut over the ranks; tensors between blocks are whole on each rank."""
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    return parallelize_module(Block(drop=drop), line(), plan)


def sequence_block(drop: float) -> nn.Module:
    """The rows are cut as well: takes and gives a DTensor, and norm and dropout work on its part.

    RowwiseParallel scatters sums, ColwiseParallel gathers rows: collectives on both sides.
    """
    plan = {
        "norm": SequenceParallel(sequence_dim=0),
        "up": ColwiseParallel(input_layouts=Shard(0)),
        "down": RowwiseParallel(output_layouts=Shard(0), use_local_output=False),
        "drop": SequenceParallel(sequence_dim=0),
    }
    return parallelize_module(Block(drop=drop), line(), plan)


class SequenceNet(Net):
    """Blocks that take DTensors, between tensors that are whole."""

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        y: Any = DTensor.from_local(self.first(x), line(), [Replicate()], run_check=False)
        y = y.redistribute(placements=[Shard(0)])
        for block in self.blocks:
            y = self.run(block, y, **kwargs)
        return y.full_tensor()


def parallel_net(run: Run, kind: str, drop: float = 0.0) -> nn.Module:
    same_on_all_ranks()
    if kind == "tensor":
        return Net(run, [parallel_block(drop) for _ in range(BLOCKS)])
    return SequenceNet(run, [sequence_block(drop) for _ in range(BLOCKS)])


kinds = pytest.mark.parametrize("kind", ["tensor", "sequence"])


@both_forms
@kinds
@on_each_rank
def test_a_step_of_tensor_parallel_blocks_is_exact(kind: str, use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        return train(parallel_net(run, kind), steps=3, data=same_on_all_ranks)

    exact(program, replays=3 * BLOCKS, use_reentrant=use_reentrant)


@both_forms
@kinds
@on_each_rank
def test_values_of_dtensors_are_compared(kind: str, use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        return train(parallel_net(run, kind), steps=2, data=same_on_all_ranks)

    exact(program, replays=2 * BLOCKS, use_reentrant=use_reentrant, determinism_check="bitwise")


@both_forms
@kinds
@on_each_rank
def test_dropout_in_tensor_parallel_blocks(kind: str, use_reentrant: bool) -> None:
    """On the CPU a DTensor draws from the default generator; torch warns that ranks may differ."""
    warnings.filterwarnings("ignore", message="DTensor random operators")

    def program(run: Run) -> Any:
        return train(parallel_net(run, kind, drop=0.25), steps=2, data=same_on_all_ranks)

    exact(program, replays=2 * BLOCKS, use_reentrant=use_reentrant)


@both_forms
@on_each_rank
def test_autocast_around_tensor_parallel_blocks(use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        model = parallel_net(run, "sequence")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return train(model, steps=2, data=same_on_all_ranks)

    exact(program, replays=2 * BLOCKS, use_reentrant=use_reentrant)


class Cut(nn.Module):
    """One tensor parallel block that checkpoints the part between its two matrices."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.block = sequence_block(0.0)
        self.run = run

    def middle(self, x: Tensor) -> Tensor:
        return torch.nn.functional.gelu(self.block.up(x))  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        h = self.run(self.middle, self.block.norm(x))  # type: ignore[operator]
        return x + self.block.down(h)  # type: ignore[no-any-return, operator]


@both_forms
@on_each_rank
def test_a_segment_inside_of_a_tensor_parallel_block(use_reentrant: bool) -> None:
    """Takes a DTensor and gives what lies on this rank."""

    def program(run: Run) -> Any:
        same_on_all_ranks()
        model = SequenceNet(plain, [Cut(run) for _ in range(BLOCKS)])
        return train(model, steps=2, data=same_on_all_ranks)

    exact(program, replays=2 * BLOCKS, use_reentrant=use_reentrant)


@on_each_rank
def test_segments_in_segments_of_tensor_parallel_blocks() -> None:
    def program(run: Run) -> Any:
        same_on_all_ranks()
        model = SequenceNet(run, [Cut(run) for _ in range(BLOCKS)])
        return train(model, steps=2, data=same_on_all_ranks)

    exact(program, replays=2 * 2 * BLOCKS)


PLACEMENTS = {
    "replicated": Replicate(),
    "rows": Shard(0),
    "columns": Shard(1),
    "partial": Partial(),
}


@both_forms
@pytest.mark.parametrize("placement", PLACEMENTS)
@on_each_rank
def test_dtensors_of_all_placements_as_arguments(placement: str, use_reentrant: bool) -> None:
    """Positional, by keyword, in a container; with a tensor that is no DTensor beside them."""

    def function(x: DTensor, pair: tuple[DTensor, Tensor], *, scale: DTensor) -> Any:
        whole = x.redistribute(placements=[Replicate()])
        y = torch.tanh(whole @ pair[0].redistribute(placements=[Replicate()]))
        local = y.to_local() * pair[1]
        return (y * scale).sin(), local.exp()

    def program(run: Run) -> Any:
        mesh = line()
        same_on_all_ranks()
        local = [torch.randn(4, 4).requires_grad_() for _ in range(4)]

        def on_mesh(t: Tensor, how: str) -> DTensor:
            return DTensor.from_local(t, mesh, [PLACEMENTS[how]], run_check=False)

        x, weight = on_mesh(local[0][:2] if placement == "rows" else local[0], placement), None
        if placement == "rows":
            weight = on_mesh(local[1], "replicated")
        elif placement == "columns":
            x = on_mesh(local[0][:, :2].contiguous(), placement)
            weight = on_mesh(local[1], "replicated")
        else:
            weight = on_mesh(local[1], placement)
        scale = on_mesh(local[3], "replicated")
        y, z = run(function, x, (weight, local[2]), scale=scale)
        (y.full_tensor().sum() + z.sum()).backward()
        return in_parts([y, z, *(t.grad for t in local)])

    exact(program, replays=1, use_reentrant=use_reentrant)


@both_forms
@on_each_rank
def test_parameters_that_are_dtensors_of_two_meshes(use_reentrant: bool) -> None:
    """Tensor parallel blocks that are sharded too: with two ranks, one dimension is of size one."""

    def program(run: Run) -> Any:
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("shard", "tensor"))
        same_on_all_ranks()
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        net = Net(run, [parallelize_module(Block(), mesh["tensor"], plan) for _ in range(BLOCKS)])
        for block in net.blocks:
            fully_shard(block, mesh=mesh["shard"])
        return train(fully_shard(net, mesh=mesh["shard"]), steps=2)

    exact(program, replays=2 * BLOCKS, use_reentrant=use_reentrant)


class Drifting:
    """Computes something else in a replay, on one rank only."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: DTensor) -> DTensor:
        self.calls += 1
        if self.calls > 1 and dist.get_rank() == 1:
            x = x * 1.5
        return x.sin().exp()


@both_forms
@on_each_rank(needs_gc=True)
def test_other_values_of_a_dtensor_in_a_replay_are_found_on_the_rank_that_has_them(
    use_reentrant: bool,
) -> None:
    x = distribute_tensor(torch.ones(4, 4), line(), [Shard(0)]).requires_grad_()
    run = checkpointed(determinism_check="bitwise", use_reentrant=use_reentrant)
    y = run(Drifting(), x).to_local().sum()
    if dist.get_rank() == 0:
        y.backward()
        assert x.grad is not None
    else:
        message = message_of(CheckpointError, y.backward)
        assert "computes other values than its forward did" in message

"""torch's ways to put checkpointing around modules, with ours as the checkpointing.

`checkpoint_wrapper` and `apply_activation_checkpointing` take our function as `checkpoint_fn`;
what calls torch's functions by itself runs on ours after `install()`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from helpers import Run, both_forms, plain
from models import WIDTH, Block, Net, exact, same_on_all_ranks, train
from ranks import on_each_rank
from torch import nn
from torch.distributed._composable import checkpoint as composable_checkpoint
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
    offload_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import torch_reprise
from torch_reprise import ledger

BLOCKS = 3
Wrap = Callable[[nn.Module], nn.Module]
"""Puts checkpointing around a module, or does not."""


def net() -> Net:
    same_on_all_ranks()
    return Net(plain, [Block() for _ in range(BLOCKS)])


def wrapper(run: Run, **options: Any) -> Wrap:
    """`checkpoint_wrapper` for a checkpointed run, nothing for a plain one."""
    if run is plain:
        return lambda module: module
    return partial(checkpoint_wrapper, checkpoint_fn=torch_reprise.checkpoint, **options)


def is_block(module: nn.Module) -> bool:
    return isinstance(module, Block)


def on_ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, static_graph=True)


def on_fsdp(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


PARALLEL = {"ddp": on_ddp, "fsdp": on_fsdp}
parallel = pytest.mark.parametrize("parallel", PARALLEL)


@both_forms
@parallel
@on_each_rank
def test_our_function_in_apply_activation_checkpointing(parallel: str, use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        model = net()
        wrap = wrapper(run, use_reentrant=use_reentrant)
        apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrap, check_fn=is_block)
        return train(PARALLEL[parallel](model), steps=2)

    exact(program, replays=2 * BLOCKS)


@both_forms
@parallel
@on_each_rank
def test_our_function_in_checkpoint_wrapper_with_keyword_arguments(
    parallel: str, use_reentrant: bool
) -> None:
    def program(run: Run) -> Any:
        model = net()
        wrap = wrapper(run, use_reentrant=use_reentrant)
        model.blocks = nn.ModuleList(wrap(block) for block in model.blocks)
        return train(PARALLEL[parallel](model), steps=2, scale=torch.full((WIDTH,), 0.5))

    exact(program, replays=2 * BLOCKS)


@parallel
@on_each_rank
def test_every_module_in_a_wrapper_of_its_own(parallel: str) -> None:
    """The default of `check_fn`: segments in segments, down to single layers."""

    def program(run: Run) -> Any:
        model = net()
        wrap = wrapper(run, use_reentrant=False)
        apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrap, check_fn=nested)
        return train(PARALLEL[parallel](model), steps=2)

    def nested(module: nn.Module) -> bool:
        return isinstance(module, (Block, nn.Linear, nn.LayerNorm, nn.Dropout))

    exact(program, replays=2 * (1 + BLOCKS * (1 + 4)))


@both_forms
@on_each_rank
def test_offload_wrapper_around_segments(use_reentrant: bool) -> None:
    """The inputs of segments are offloaded, nothing else: what is inside is not saved.

    The reference is without offloading. That alone changes bits: it hands transposed weights back
    with another memory layout, and matrix products round differently.
    """

    def program(run: Run) -> Any:
        wrap = wrapper(run, use_reentrant=use_reentrant)
        model = net()
        if run is not plain:
            model.blocks = nn.ModuleList(offload_wrapper(wrap(block)) for block in model.blocks)
        return train(on_ddp(model), steps=2)

    exact(program, replays=2 * BLOCKS)


@both_forms
@on_each_rank
def test_offload_wrapper_inside_of_segments(use_reentrant: bool) -> None:
    """The inner hooks win: with hooks of ours around them nothing is left to be replayed.

    The reentrant form saves nothing in its forward, and offloads what its replay saves.
    """

    def program(run: Run) -> Any:
        wrap = wrapper(run, use_reentrant=use_reentrant)
        model = net()
        model.blocks = nn.ModuleList(wrap(offload_wrapper(block)) for block in model.blocks)
        return train(on_ddp(model), steps=2)

    before = ledger.segments()
    exact(program, replays=2 * BLOCKS if use_reentrant else 0)
    assert ledger.segments() == before + 2 * BLOCKS


def installed_run(run: Run) -> Any:
    """torch's names bound to ours for a checkpointed run."""
    return nullcontext() if run is plain else torch_reprise.installed()


@parallel
@on_each_rank
def test_composable_checkpoint_runs_on_ours(parallel: str) -> None:
    def program(run: Run) -> Any:
        with installed_run(run):
            model = net()
            if run is not plain:
                for block in model.blocks:
                    composable_checkpoint(block)
            return train(PARALLEL[parallel](model), steps=2)

    exact(program, replays=2 * BLOCKS)


@parallel
@on_each_rank
def test_composable_checkpoint_of_parts_of_modules(parallel: str) -> None:
    """A segment inside of the sharded module, whose parameters its replay finds gathered."""

    def program(run: Run) -> Any:
        with installed_run(run):
            model = net()
            if run is not plain:
                for block in model.blocks:
                    composable_checkpoint(block.up)
                    composable_checkpoint(block.norm)
            return train(PARALLEL[parallel](model), steps=2)

    exact(program, replays=2 * 2 * BLOCKS)


@pytest.mark.parametrize("implementation", list(CheckpointImpl))
@parallel
@on_each_rank
def test_torchs_wrapper_runs_on_ours_once_installed(
    parallel: str, implementation: CheckpointImpl
) -> None:
    """Both of its forms, with keyword arguments, which it packs for the reentrant one."""

    def program(run: Run) -> Any:
        with installed_run(run):
            model = net()
            if run is not plain:
                wrapped = [checkpoint_wrapper(block, implementation) for block in model.blocks]
                model.blocks = nn.ModuleList(wrapped)
            return train(PARALLEL[parallel](model), steps=2, scale=torch.full((WIDTH,), 0.5))

    exact(program, replays=2 * BLOCKS)

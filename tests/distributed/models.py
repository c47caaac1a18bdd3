"""What the tests of this folder train, and how a step is compared.

All of it runs in the workers. A *program* is what tests/helpers.py says it is; `exact` plays it
plainly and checkpointed on this rank, with numbers that differ between ranks, and requires the same
bits and as many replays as are expected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from helpers import Program, Run, assert_exact, grads
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

WIDTH = 8


class Block(nn.Module):
    """A residual block with dropout."""

    def __init__(self, width: int = WIDTH, drop: float = 0.25) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        h = self.drop(self.down(torch.nn.functional.gelu(self.up(self.norm(x)))))
        return x + (h if scale is None else h * scale)


class Net(nn.Module):
    """`blocks` one after the other, each of them a segment of `run`."""

    def __init__(self, run: Run, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.run = run
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = self.run(block, x, **kwargs)
        return x


def rank_seed() -> int:
    return 100 + dist.get_rank()


def same_on_all_ranks() -> None:
    """What is drawn next is the same on all ranks: weights."""
    torch.manual_seed(1)


def differs_between_ranks() -> None:
    """What is drawn next differs between ranks: data and dropout."""
    torch.manual_seed(rank_seed())


def batch(*shape: int) -> Tensor:
    return torch.randn(shape or (4, WIDTH)).requires_grad_()


def state_of(model: nn.Module) -> dict[str, Any]:
    """Gradients, parameters and buffers, without the names, which wrappers change."""
    return {
        "gradients": grads(model),
        "parameters": [p.detach().clone() for p in model.parameters()],
        "buffers": [b.detach().clone() for b in model.buffers()],
    }


def descend(model: nn.Module, rate: float = 0.05) -> None:
    """A step of gradient descent, so that a wrong gradient spoils what follows."""
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= rate * p.grad


def train(
    model: nn.Module,
    steps: int = 2,
    data: Callable[[], object] = differs_between_ranks,
    **kwargs: Any,
) -> list[Any]:
    """Trains on data that is drawn after `data()`; what there is to compare after each step."""
    data()
    rows = []
    for _ in range(steps):
        model.zero_grad()
        x = batch()
        y = model(x, **kwargs)
        y.square().sum().backward()
        rows.append([y.detach(), x.grad, torch.get_rng_state(), state_of(model)])
        descend(model)
    return rows


def in_parts(value: Any) -> Any:
    """`value` with each DTensor as what lies on this rank and how the ranks share it."""

    def part(t: Any) -> Any:
        if not isinstance(t, DTensor):
            return t
        local = t.detach().to_local()
        return ["DTensor", repr(t.placements), tuple(t.shape), t.requires_grad, local]

    return tree_map(part, value)


def exact(program: Program, *, replays: int, **options: Any) -> None:
    assert_exact(lambda run: in_parts(program(run)), replays=replays, seed=rank_seed(), **options)

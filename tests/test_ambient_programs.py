"""Random programs of contexts around and inside of segments, and of backwards, give the same bits.

Contexts of autocast to several dtypes with weights that all share, default dtypes, modes; in and
outside of segments, nested, with backwards inside of functions, between segments and at the end,
themselves in contexts. `REPRISE_PROGRAMS=N` runs N programs instead of the default, in batches.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import (
    AlteredFunction,
    AlteredOperator,
    Run,
    checkpointed,
    plain,
    random_steps,
    setting,
)
from torch import Tensor

from torch_reprise import Checkpointer

BATCH = 25
PROGRAMS = int(os.environ.get("REPRISE_PROGRAMS", "500"))
OPS = ("first weight", "second weight", "both weights", "new tensor", "sin", "sin")
BLOCKS = ("segment", "segment", "context", "local grad")


CONTEXTS: tuple[Callable[[], AbstractContextManager[Any]], ...] = (
    lambda: torch.autocast("cpu", torch.bfloat16),
    lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
    lambda: torch.autocast("cpu", torch.half),
    lambda: torch.autocast("cpu", enabled=False),
    lambda: setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    lambda: AlteredFunction(torch.sin, lambda result: result * 2),
    lambda: AlteredOperator(torch.ops.aten.cos.default, lambda result: result + 1),
)
# A mode that is active around a replay alone is an observer, and stays (docs/replay.md).
AROUND_BACKWARD = CONTEXTS[:-2]


@dataclass
class Step:
    kind: str
    context: int = 0
    inner: list[Step] = field(default_factory=list)


def steps(choose: random.Random) -> list[Step]:
    def step(kind: str) -> Step:
        return Step(kind, choose.randrange(len(CONTEXTS)))

    return random_steps(choose, OPS, BLOCKS, step)


@dataclass
class Player:
    run: Run
    weights: list[Tensor]

    def play(self, program: list[Step], x: Tensor) -> Tensor:
        for step in program:
            x = self.step(step, x)
        return x

    def step(self, step: Step, x: Tensor) -> Tensor:
        first, second = self.weights
        match step.kind:
            case "first weight":
                return (x.float() @ first).sin()
            case "second weight":
                return torch.nn.functional.linear(x.float(), second).cos()
            case "both weights":
                return ((x.float() @ first) @ second.float()).tanh()
            case "new tensor":
                return x * torch.ones(3).exp()
            case "sin":
                return torch.sin(x)
            case "segment":
                return self.run(lambda value: self.play(step.inner, value), x)
            case "context":
                with CONTEXTS[step.context]():
                    return self.play(step.inner, x)
            case "local grad":
                start = x.detach().float().requires_grad_()
                (grad,) = torch.autograd.grad(self.play(step.inner, start).float().sum(), start)
                return x + grad
        raise AssertionError(f"no such step: {step.kind}")


def outcome(seed: int, run: Run) -> list[Tensor] | str:
    """Results and gradients, or how torch refused the program."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    weights = [(torch.randn(3, 3) / 2).requires_grad_() for _ in range(2)]
    x = torch.linspace(0, 1, 9).reshape(3, 3).requires_grad_()
    player = Player(run, weights)
    results: list[Tensor] = []
    try:
        for _ in range(choose.randint(1, 3)):
            part = [Step("context", choose.randrange(len(CONTEXTS)), steps(choose))]
            results.append(player.play(part if choose.random() < 0.5 else part[0].inner, x))
        with choose.choice(AROUND_BACKWARD)():
            torch.autograd.backward([result.float().sum() for result in results])
    except RuntimeError as error:
        return str(error).splitlines()[0]
    grads = [leaf.grad for leaf in (x, *weights) if leaf.grad is not None]
    return [result.detach() for result in results] + grads


def same(ours: list[Tensor] | str, theirs: list[Tensor] | str) -> bool:
    if isinstance(ours, str) or isinstance(theirs, str):
        return False
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def compared(seeds: range, run: Run) -> tuple[list[int], int]:
    """The programs that differ, and how many torch refuses without checkpointing."""
    differing, refused = [], 0
    for seed in seeds:
        theirs = outcome(seed, plain)
        if isinstance(theirs, str):
            refused += 1
        elif not same(outcome(seed, run), theirs):
            differing.append(seed)
    return differing, refused


@pytest.mark.parametrize("batch", range(-(-PROGRAMS // BATCH)))
def test_random_contexts_are_exact(batch: int) -> None:
    differing, refused = compared(
        range(batch * BATCH, (batch + 1) * BATCH), checkpointed(use_reentrant=False)
    )
    assert differing == []
    assert refused < BATCH // 2


def test_many_programs_need_the_contexts() -> None:
    unaware = Checkpointer(use_reentrant=False, ambient="ignore")
    assert len(compared(range(BATCH), unaware)[0]) > BATCH // 4

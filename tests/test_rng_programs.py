"""Random programs of draws, seeds, states put back and nested segments give the same bits.

Steps that draw, in both forms and nested, with generators that are forked, seeded anew and set to
a state from before inside of segments, and with blocks of the CPU's generator that end anywhere.
`REPRISE_PROGRAMS=N` runs N programs instead of the default, in batches.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import Run, checkpointed, plain, random_steps
from torch import Tensor
from torch.nn.functional import dropout

BATCH = 25
PROGRAMS = int(os.environ.get("REPRISE_PROGRAMS", "500"))
# Around the 624 words that the CPU's generator makes at a time.
COUNTS = (1, 2, 3, 5, 8, 17, 623, 624, 625)
STEPS = ("rand", "randn", "randn", "many", "dropout", "explicit", "seed", "set state", "sin")
BLOCKS = ("fork", "fork and seed", "segment", "segment")


@dataclass
class Step:
    kind: str
    count: int
    number: int
    inner: list[Step] = field(default_factory=list)


def steps(choose: random.Random, depth: int = 0) -> list[Step]:
    def step(kind: str) -> Step:
        return Step(kind, choose.choice(COUNTS), choose.randint(0, 9))

    return random_steps(choose, STEPS, BLOCKS, step, depth)


@dataclass
class Player:
    forms: dict[bool, Run]  # by use_reentrant
    generator: torch.Generator
    state: Tensor

    def play(self, program: list[Step], x: Tensor) -> Tensor:
        for step in program:
            x = self.step(step, x)
        return x

    def step(self, step: Step, x: Tensor) -> Tensor:
        match step.kind:
            case "rand":
                return (x * (1 + torch.rand(step.count).mean())).sin()
            case "randn":
                dtype = torch.float64 if step.number % 2 else torch.float32
                return (x + torch.randn(step.count, dtype=dtype).sum().float()).sin()
            case "many":
                return (x + torch.rand(2000).mean()).cos()
            case "dropout":
                return dropout(x, 0.5).exp().tanh()
            case "explicit":
                return (x * torch.rand(x.shape, generator=self.generator)).sin()
            case "seed":
                torch.manual_seed(step.number)
                return x.sin()
            case "set state":
                torch.set_rng_state(self.state)
                return x.cos()
            case "fork":
                with torch.random.fork_rng(devices=[]):
                    return self.play(step.inner, x)
            case "fork and seed":
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(step.number)
                    return self.play(step.inner, x)
            case "segment":
                run = self.forms[step.number < 3]
                return run(lambda value: self.play(step.inner, value), x)
            case "sin":
                return x.sin()
        raise AssertionError(f"no such step: {step.kind}")


def outcome(seed: int, forms: dict[bool, Run]) -> list[Tensor]:
    """Result, gradient and where both generators stand after the backward."""
    choose = random.Random(seed)
    program = [*steps(choose), Step("segment", 1, choose.randint(0, 9), steps(choose, 1))]
    torch.manual_seed(seed)
    player = Player(forms, torch.Generator().manual_seed(3), torch.get_rng_state())
    torch.rand(choose.randint(0, 700))
    x = torch.linspace(0, 1, 6).requires_grad_()
    result = player.play(program, x)
    if choose.random() < 0.3:
        torch.rand(5)
    if choose.random() < 0.3:
        torch.manual_seed(4)
    result.sum().backward()
    assert x.grad is not None
    return [result.detach(), x.grad, torch.get_rng_state(), player.generator.get_state()]


def both(**options: Any) -> dict[bool, Run]:
    return {form: checkpointed(use_reentrant=form, **options) for form in (False, True)}


def differing(seeds: range, forms: dict[bool, Run]) -> list[int]:
    return [
        seed
        for seed in seeds
        if not all(
            map(
                torch.equal,
                outcome(seed, forms),
                outcome(seed, dict.fromkeys((False, True), plain)),
            )
        )
    ]


@pytest.mark.parametrize("batch", range(-(-PROGRAMS // BATCH)))
def test_random_draws_are_exact(batch: int) -> None:
    assert differing(range(batch * BATCH, (batch + 1) * BATCH), both()) == []


def test_most_programs_need_the_states() -> None:
    assert len(differing(range(BATCH), both(preserve_rng_state=False))) > BATCH // 3

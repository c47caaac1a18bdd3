"""R: a replay draws the numbers that the forward drew."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

from ..implementations import Implementation
from ..registry import Needs, case
from .common import clear, leaf, saving


@case("R1", "torch.Generator as an argument")
def generator_argument(use: Implementation) -> Any:
    def noisy(x: Tensor, generator: torch.Generator) -> Tensor:
        use.tick()
        return (x * torch.rand(x.shape, generator=generator)).sin()

    generator = torch.Generator().manual_seed(5)
    x = leaf(4)
    out = use.checkpoint(noisy, x, generator)
    between = torch.rand(2, generator=generator)
    out.sum().backward()
    return {
        "output": out,
        "gradient": x.grad,
        "drawn later": between,
        "state": generator.get_state(),
    }


@case("R1", "torch.Generator in a closure")
def generator_closure(use: Implementation) -> Any:
    generator = torch.Generator().manual_seed(5)

    def noisy(x: Tensor) -> Tensor:
        use.tick()
        return (x * torch.rand(x.shape, generator=generator)).sin()

    x = leaf(4)
    out = use.checkpoint(noisy, x)
    out.sum().backward()
    return {"output": out, "gradient": x.grad, "state": generator.get_state()}


@case("R1", "torch.Generator as a module's attribute")
def generator_attribute(use: Implementation) -> Any:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator().manual_seed(5)

        def forward(self, x: Tensor) -> Tensor:
            use.tick()
            return (x * torch.rand(x.shape, generator=self.generator)).sin()

    noisy, x = Noisy(), leaf(4)
    out = use.checkpoint(nn.Sequential(nn.Linear(4, 4), noisy), x)
    out.sum().backward()
    return {"output": out, "gradient": x.grad, "state": noisy.generator.get_state()}


@case("R2", "Python's random")
def python_random(use: Implementation) -> Any:
    def noisy(x: Tensor) -> Tensor:
        use.tick()
        return (x * random.random()).sin()

    x = leaf(4)
    out = use.configured(host_rng=True)(noisy, x)
    between = random.random()
    out.sum().backward()
    return {"output": out, "gradient": x.grad, "drawn later": between}


@case("R2", "NumPy's global generator", needs=Needs.NUMPY)
def numpy_random(use: Implementation) -> Any:
    import numpy

    numpy.random.seed(5)

    def noisy(x: Tensor) -> Tensor:
        use.tick()
        return (x * float(numpy.random.rand())).sin()

    x = leaf(4)
    out = use.configured(host_rng=True)(noisy, x)
    between = numpy.random.rand()
    out.sum().backward()
    return {"output": out, "gradient": x.grad, "drawn later": between}


def _draws(use: Implementation, counts: list[int]) -> Any:
    """A function that draws 37 numbers at a time, as often as the next of `counts` says."""

    def fn(x: Tensor) -> Tensor:
        use.tick()
        for _ in range(counts.pop(0)):
            torch.rand(37)
        return x.sin()

    return fn


# Both counts, whatever the sentence around them.
@case(
    "R9",
    "the replay draws more numbers",
    reproducible=False,
    error=clear(r"generator cpu(?=.*\b37\b)(?=.*\b74\b)"),
)
def draws_more(use: Implementation) -> Any:
    out = use.checkpoint(_draws(use, [1, 2]), leaf(4))
    out.sum().backward()
    return []


@case(
    "R9",
    "the replay draws fewer numbers",
    reproducible=False,
    error=clear(r"generator cpu(?=.*\b37\b)(?=.*\b74\b)"),
)
def draws_fewer(use: Implementation) -> Any:
    out = use.configured(early_stop=False)(_draws(use, [2, 1]), leaf(4))
    out.sum().backward()
    return []


@case("R10", "selective checkpointing that saves a random operator")
def selective_saves_random(use: Implementation) -> Any:
    def noisy(x: Tensor) -> Tensor:
        use.tick()
        first = torch.rand_like(x)  # saved: not drawn again
        return ((x * first).sin() * torch.randn_like(x)).exp()

    x = leaf(4)
    out = use.configured(selective=saving("rand_like"))(noisy, x)
    out.sum().backward()
    return {"output": out, "gradient": x.grad}

"""The names that generated programs use beside torch's own.

Everything here is deterministic given the generators' states, and none of it looks at whether it is
checkpointed.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections import namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = namedtuple("Pair", ["left", "right"])


class Box:
    """A user's own container: no pytree knows it."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Call(nn.Module):
    """Makes a module of a function, so that a segment's callable may be one."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class SavesOutput(torch.autograd.Function):
    """tanh that saves its output: the saved tensor is the result of the node itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y)


class SavesMany(torch.autograd.Function):
    """Saves an input, an intermediate and None; the second output has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        middle = torch.sin(y)
        index = x.argmax(-1)
        ctx.save_for_backward(x, None, middle, y)
        ctx.mark_non_differentiable(index)
        ctx.factor = factor
        return x * middle * factor, index

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _index: Tensor) -> tuple[Tensor, Tensor, None]:
        x, nothing, middle, y = ctx.saved_tensors
        assert nothing is None
        return grad * middle * ctx.factor, grad * x * torch.cos(y) * ctx.factor, None


class SavesDraw(torch.autograd.Function):
    """A dropout of its own: the mask is drawn in the forward and saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        mask = torch.bernoulli(torch.full_like(x, 0.7))
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]


class ScalesInPlace(torch.autograd.Function):
    """Changes its input and says so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(0.75)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 0.75


class Enter(torch.autograd.Function):
    """The only reader of an argument in programs of the reentrant form.

    The gradient of an argument passes through a leaf of the replay there, which gives it the leaf's
    memory layout, and sums over another layout round differently.  So it leaves here contiguous.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.01

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return (grad * 1.01).contiguous()


def hook(x: Tensor, function: Callable[[Tensor], Tensor]) -> None:
    """A gradient hook, where there will be a gradient."""
    if x.requires_grad:
        x.register_hook(function)


def same_layout_copy(x: Tensor) -> Tensor:
    """What a pack hook may keep of x: with another layout a replay could round differently."""
    copy = x.detach().clone()
    return copy if copy.stride() == x.stride() else x.detach()


def local_grad(
    output: Tensor, x: Tensor, *, retain_graph: bool = True, create_graph: bool = False
) -> Tensor:
    """d output.sum() / d x by autograd.grad, or zeros where x is not in the graph of output."""
    if not (output.requires_grad and x.requires_grad):
        return torch.zeros_like(x)
    (grad,) = torch.autograd.grad(
        output, x, torch.ones_like(output), retain_graph, create_graph, allow_unused=True
    )
    return torch.zeros_like(x) if grad is None else grad


def penalty(grads: Any) -> Tensor:
    """Sum of squares of those gradients that exist: what a gradient penalty adds to a loss."""
    total = torch.zeros((), dtype=torch.float64)
    for grad in grads:
        if grad is not None:
            total = total + (grad * grad.conj()).real.sum().double()
    return total


SCALE: contextvars.ContextVar[float] = contextvars.ContextVar("SCALE", default=1.0)


@contextlib.contextmanager
def settings(dtype: torch.dtype, scale: float) -> Iterator[None]:
    """What `linspace` and `SCALE` see, for a part of the forward."""
    before, token = torch.get_default_dtype(), SCALE.set(scale)
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        SCALE.reset(token)


NAMES: dict[str, Any] = {
    "SCALE": SCALE,
    "torch": torch,
    "nn": nn,
    "F": F,
    "functools": functools,
    **{
        thing.__name__: thing
        for thing in (
            *(Pair, Box, Call, Enter, SavesOutput, SavesMany, SavesDraw, ScalesInPlace),
            *(hook, local_grad, penalty, same_layout_copy, settings),
        )
    },
}

"""A: a replay runs in the surroundings of the forward, and not in those of the backward call."""

# mypy: allow-untyped-calls
from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..implementations import Implementation
from ..registry import Verdict, case
from .common import clear, grads, leaf, saving


# In a process of its own: a kernel that is given what another one has saved may end the process.
@case("A1", "sdpa_kernel around the forward alone", fresh_process=True)
def attention_kernel(use: Implementation) -> Any:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        use.tick()
        return scaled_dot_product_attention(q, k, v).sin()

    inputs = [leaf(1, 2, 8, 4) for _ in range(3)]
    with sdpa_kernel(SDPBackend.MATH):
        out = use.checkpoint(attention, *inputs)
    out.sum().backward()
    return out, grads(inputs)


@case("A2", "default dtype changed, which other dtypes show")
def default_dtype_shows(use: Implementation) -> Any:
    def scaled(x: Tensor) -> Tensor:
        use.tick()
        return (x * torch.linspace(0, 1, 4)).sin()

    x = leaf(4)
    out = use.checkpoint(scaled, x)
    torch.set_default_dtype(torch.float64)
    out.sum().backward()
    return {"output": out, "gradient": x.grad}


@case("A2", "default dtype changed, which only values show")
def default_dtype_hides(use: Implementation) -> Any:
    def scaled(x: Tensor) -> Tensor:
        use.tick()
        return (x * torch.linspace(0, 1, 64).cumsum(0).sin().to(x.dtype)).sin()

    x = leaf(64)
    out = use.checkpoint(scaled, x)
    torch.set_default_dtype(torch.float64)
    out.sum().backward()
    return {"output": out, "gradient": x.grad}


def _flag(
    title: str, read: Callable[[], Any], set_flag: Callable[[bool], None], initial: bool = False
) -> None:
    """A case whose function asks for a flag, as operators do; it changes before backward."""

    @case("A3", title)
    def program(use: Implementation) -> Any:
        seen = []

        def fn(x: Tensor) -> Tensor:
            use.tick()
            seen.append(read())
            return (x * (2.0 if seen[-1] == seen[0] else 3.0)).sin()

        set_flag(initial)
        x = leaf(4)
        out = use.checkpoint(fn, x)
        set_flag(not initial)
        out.sum().backward()
        return {"output": out, "gradient": x.grad, "flag": read()}


_flag(
    "deterministic algorithms",
    torch.are_deterministic_algorithms_enabled,
    torch.use_deterministic_algorithms,
)
_flag(
    "float32 matmul precision",
    torch.get_float32_matmul_precision,
    lambda value: torch.set_float32_matmul_precision("high" if value else "highest"),
)
for _name in ("enabled", "benchmark", "deterministic", "allow_tf32"):
    _flag(
        f"cuDNN: {_name}",
        functools.partial(getattr, torch.backends.cudnn, _name),
        functools.partial(setattr, torch.backends.cudnn, _name),
    )
_flag(
    "mkldnn: enabled",
    lambda: torch.backends.mkldnn.enabled,
    torch.backends.mkldnn.set_flags,
    initial=True,
)


class _CosineFunctions(TorchFunctionMode):
    """Makes sine cosine, as seen from Python."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        function = torch.Tensor.cos if function is torch.Tensor.sin else function
        return function(*args, **(kwargs or {}))


class _DoubledSines(TorchFunctionMode):
    """Counts for as often as it is entered."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        return result * 2 if function is torch.Tensor.sin else result


class _CosineOperators(TorchDispatchMode):
    """Makes sine cosine below autograd, so that gradients do not know."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.sin.default:
            function = torch.ops.aten.cos.default
        return function(*args, **(kwargs or {}))


class _CosineTensor(Tensor):
    """Its sine is the cosine."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        function = Tensor.cos if function is Tensor.sin else function
        return super().__torch_function__(function, types, args, kwargs)


def _in_the_forward(
    title: str, enter: Callable[[], AbstractContextManager[object]], kind: type[Tensor] = Tensor
) -> None:
    @case("A4", title, issues=(147995, 84864) if kind is Tensor else ())
    def program(use: Implementation) -> Any:
        def fn(x: Tensor) -> Tensor:
            use.tick()
            return x.sin().exp()

        x = leaf(4).detach().as_subclass(kind).requires_grad_()
        with enter():
            out = use.checkpoint(fn, x)
        out.sum().backward()
        return {"output": out, "gradient": x.grad}


def _twice(mode: AbstractContextManager[object]) -> AbstractContextManager[object]:
    entered = contextlib.ExitStack()
    entered.enter_context(mode)
    entered.enter_context(mode)
    return entered


_in_the_forward("TorchFunctionMode around the forward alone", _CosineFunctions)
_in_the_forward("TorchDispatchMode around the forward alone", _CosineOperators)
_in_the_forward("a TorchFunctionMode that is entered in itself", lambda: _twice(_DoubledSines()))
_in_the_forward(
    "a subclass of Tensor with __torch_function__: its backward runs without",
    contextlib.nullcontext,
    _CosineTensor,
)
_in_the_forward(
    "__torch_function__ switched off around the forward alone",
    torch._C.DisableTorchFunctionSubclass,
    _CosineTensor,
)

_scale = contextvars.ContextVar("scale", default=1.0)


@case("A5", "a context variable set anew before backward")
def context_variable(use: Implementation) -> Any:
    def fn(x: Tensor) -> Tensor:
        use.tick()
        return (x * _scale.get()).sin()

    x = leaf(4)
    _scale.set(2.0)
    out = use.checkpoint(fn, x)
    _scale.set(3.0)
    out.sum().backward()
    return {"output": out, "gradient": x.grad, "variable": _scale.get()}


@case("A6", "autocast of the CPU around the forward alone")
def autocast_cpu(use: Implementation) -> Any:
    module = nn.Linear(4, 4)

    def fn(x: Tensor) -> Tensor:
        use.tick()
        return torch.sin(module(x))

    x = leaf(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = use.checkpoint(fn, x)
    out.sum().backward()
    return {"output": out, "gradient": x.grad, "of weights": grads(module.parameters())}


@case("A6", "autocast of another device type around the forward alone")
def autocast_elsewhere(use: Implementation) -> Any:
    """Its settings, which are there without such a device; a function may ask for them."""

    def fn(x: Tensor) -> Tensor:
        use.tick()
        on = torch.is_autocast_enabled("xpu")
        half = torch.get_autocast_dtype("xpu") is torch.float16
        return (x * (2.0 if on else 3.0) * (5.0 if half else 7.0)).sin()

    x = leaf(4)
    torch.set_autocast_enabled("xpu", True)
    torch.set_autocast_dtype("xpu", torch.float16)
    out = use.checkpoint(fn, x)
    torch.set_autocast_enabled("xpu", False)
    torch.set_autocast_dtype("xpu", torch.bfloat16)
    out.sum().backward()
    return {"output": out, "gradient": x.grad}


@case("A6", "autocast, a weight shared by segments with selective checkpointing", issues=(193338,))
def autocast_shared_weight(use: Implementation) -> Any:
    """The second segment takes the cast weight from autocast's cache, in the forward."""
    weight = leaf(4, 4)

    def fn(x: Tensor) -> Tensor:
        use.tick()
        return torch.sin(linear(x, weight))

    x = leaf(2, 4)
    run = use.configured(selective=saving("_to_copy", "mm"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run(fn, run(fn, x))
    out.sum().backward()
    return {"output": out, "gradient": x.grad, "of the weight": weight.grad}


class _Block(nn.Module):
    def __init__(self, use: Implementation, layer: nn.Module) -> None:
        super().__init__()
        self.use = use
        self.first = nn.Linear(4, 4)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        self.use.tick()
        hidden: Tensor = self.layer(self.first(x).sin())
        return hidden.exp()


# What a user can act on: which module it was, or that it was the mode.
_NAMES_MODE = clear(r"(?i)(layer|dropout|batchnorm|_block).*(train|eval)|(train|eval).*(layer)")


# In processes of their own, for the reason that A1 is.
def _flipped(title: str, layer: Callable[[], nn.Module], training: bool) -> None:
    @case(
        "A7",
        title,
        allowed=(Verdict.EXACT, Verdict.CLEAR),
        error=_NAMES_MODE,
        fresh_process=layer is not nn.Dropout,
    )
    def program(use: Implementation) -> Any:
        block = _Block(use, layer()).train(training)
        x = leaf(3, 4)
        out = use.checkpoint(block, x)
        block.train(not training)
        out.sum().backward()
        return {
            "output": out,
            "gradient": x.grad,
            "of weights": grads(block.parameters()),
            "buffers": list(block.buffers()),
            "training": block.training,
        }


_flipped("dropout: forward in train(), backward after eval()", nn.Dropout, True)
_flipped("dropout: forward in eval(), backward after train()", nn.Dropout, False)
_flipped("batch norm: forward in train(), backward after eval()", lambda: nn.BatchNorm1d(4), True)
_flipped("batch norm: forward in eval(), backward after train()", lambda: nn.BatchNorm1d(4), False)

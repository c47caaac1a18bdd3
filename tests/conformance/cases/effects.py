"""S: what a function does besides returning something happens once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rrelu
from torch.nn.utils.parametrizations import spectral_norm

from ..implementations import Implementation
from ..registry import Program, Verdict, case
from .common import clear, grads, leaf


def _with_buffers(row: str, title: str, make: Callable[[], nn.Module], **options: Any) -> None:
    """Two steps of training a module whose forward changes its buffers."""

    @case(row, title, **options)
    def program(use: Implementation) -> Any:
        module = make().train()

        def fn(x: Tensor) -> Tensor:
            use.tick()
            hidden: Tensor = module(x.sin())
            return hidden.exp()

        results: dict[str, Any] = {}
        for step in (1, 2):
            x = leaf(5, 4)
            out = use.checkpoint(fn, x)
            out.sum().backward()
            buffers = {name: b.clone() for name, b in module.named_buffers()}
            results[f"step {step}"] = {"output": out, "gradient": x.grad, "buffer": buffers}
        return {**results, "gradients of parameters": grads(module.parameters())}


class _Counter(nn.Module):
    """Divides by how often it was called."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return (x / self.steps.to(x.dtype)).sin()


class _Codebook(nn.Module):
    """Scales by the nearest codes, and moves them towards what they were nearest to."""

    codes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x.detach(), self.codes).argmin(1)
        chosen = self.codes[nearest]
        self.codes.mul_(0.9).index_add_(0, nearest, x.detach(), alpha=0.1)
        return (x * chosen).sin()


class _Mean(nn.Module):
    """Follows its inputs by assignment, not in place."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return (x * self.mean).sin()


_with_buffers("S1", "running statistics of batch norm", lambda: nn.BatchNorm1d(4), issues=(96136,))
_with_buffers("S2", "vectors of spectral norm", lambda: spectral_norm(nn.Linear(4, 4)))
_with_buffers("S2", "a counter", _Counter)
_with_buffers("S2", "a codebook that follows its inputs", _Codebook)
_with_buffers("S2", "a mean that the module gives itself anew", _Mean)


@case("S1", "running statistics of batch norm, whose forward is an argument")
def batch_norm_by_an_argument(use: Implementation) -> Any:
    module = nn.BatchNorm1d(4).train()

    def apply(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        use.tick()
        return layer(x.sin()).exp()

    x = leaf(5, 4)
    out = use.checkpoint(apply, module.forward, x)
    out.sum().backward()
    return {"output": out, "gradient": x.grad, "buffer": dict(module.named_buffers())}


@case("S2", "an embedding with max_norm, which scales its rows in the forward")
def scaled_embedding(use: Implementation) -> Any:
    embedding = nn.Embedding(40, 65, max_norm=3.0)  # twice is not once, to the last bit

    def fn(x: Tensor, index: Tensor) -> Tensor:
        use.tick()
        return embedding(index).tanh() * x

    x = leaf(1)
    for _ in range(2):
        out = use.checkpoint(fn, x, torch.arange(40))
        out.sum().backward()
    return {
        "output": out,
        "gradient": x.grad,
        "weight": embedding.weight,
        "gradient of weight": embedding.weight.grad,
    }


# Plain autograd tells the shape. Names are what tells which of many tensors it was.
_NAMED = clear(r"(?i)(?=.*in.?place)(?=.*\b(scales?|weight|argument))", "RuntimeError")


@case("S3", "keyword argument changed in place before backward", plain_raises=True, error=_NAMED)
def changed_keyword(use: Implementation) -> Any:
    def fn(x: Tensor, *, scale: Tensor) -> Tensor:
        use.tick()
        return (x * scale).sin()

    x, scale = leaf(4), torch.randn(4)
    out = use.checkpoint(fn, x, scale=scale)
    scale.add_(1)
    out.sum().backward()
    return {"output": out, "gradient": x.grad}


@case("S3", "element of a list changed in place before backward", plain_raises=True, error=_NAMED)
def changed_element(use: Implementation) -> Any:
    def fn(x: Tensor, scales: list[Tensor]) -> Tensor:
        use.tick()
        return (x * scales[0]).sin()

    x, scale = leaf(4), torch.randn(4)
    out = use.checkpoint(fn, x, [scale])
    scale.add_(1)
    out.sum().backward()
    return {"output": out, "gradient": x.grad}


@case(
    "S3",
    "closed-over parameter changed in place before backward",
    plain_raises=True,
    error=_NAMED,
)
def changed_parameter(use: Implementation) -> Any:
    weight = nn.Parameter(torch.randn(4))

    def fn(x: Tensor) -> Tensor:
        use.tick()
        return (x * weight).sin()

    x = leaf(4)
    out = use.checkpoint(fn, x)
    with torch.no_grad():
        weight.add_(1)
    out.sum().backward()
    return {"output": out, "gradient": x.grad, "of the weight": weight.grad}


# The noise is saved first and filled afterwards. As the last thing that a function saves it is what
# a replay that stops early stops at.


@case("S4", "RReLU as the last operator", issues=(193671,))
def random_leaky_relu(use: Implementation) -> Any:
    def fn(x: Tensor) -> Tensor:
        use.tick()
        return rrelu(x.sin(), 0.1, 0.9, training=True)

    x = leaf(64)
    out = use.checkpoint(fn, x)
    out.sum().backward()
    return {"output": out, "gradient": x.grad}


@case("S4", "RReLU in place as the last operator", issues=(193671,))
def random_leaky_relu_in_place(use: Implementation) -> Any:
    module = nn.RReLU(0.1, 0.9, inplace=True).train()

    def fn(x: Tensor) -> Tensor:
        use.tick()
        hidden: Tensor = module(x.sin())
        return hidden

    x = leaf(64)
    out = use.checkpoint(fn, x)
    out.sum().backward()
    return {"output": out, "gradient": x.grad}


@case("S4", "RReLU with more behind it", issues=(193671,))
def random_leaky_relu_inside(use: Implementation) -> Any:
    def fn(x: Tensor) -> Tensor:
        use.tick()
        return rrelu(x.sin(), 0.1, 0.9, training=True).exp()

    x = leaf(64)
    out = use.checkpoint(fn, x)
    out.sum().backward()
    return {"output": out, "gradient": x.grad}


_CONTAINER = clear(r"(?i)(list|dict|container|cache|argument).*(chang|mutat|modif|length|element)")


def _containers(title: str, **options: Any) -> Callable[[Program], Program]:
    return case(
        "S5",
        title,
        issues=(155171,),
        allowed=(Verdict.EXACT, Verdict.CLEAR),
        error=_CONTAINER,
        **options,
    )


@_containers("takes an element out of a list argument")
def pops_from_a_list(use: Implementation) -> Any:
    def fn(x: Tensor, scales: list[float]) -> Tensor:
        use.tick()
        return (x * scales.pop()).sin()

    x, scales = leaf(4), [3.0]
    out = use.checkpoint(fn, x, scales)
    out.sum().backward()
    return {"output": out, "gradient": x.grad, "list": scales}


@_containers("appends to a list argument and computes with its length")
def appends_to_a_list(use: Implementation) -> Any:
    def fn(x: Tensor, cache: list[Tensor]) -> Tensor:
        use.tick()
        cache.append(x.detach())
        return (x * float(len(cache))).sin()

    x, cache = leaf(4), list[Tensor]()
    out = use.checkpoint(fn, x, cache)
    out.sum().backward()
    return {"output": out, "gradient": x.grad, "cache": cache}


@_containers("a cache as keyword argument, in a dict")
def fills_a_dict(use: Implementation) -> Any:
    """As the key-value cache of a language model: what is there is put in front."""

    def fn(x: Tensor, *, cache: dict[str, Tensor]) -> Tensor:
        use.tick()
        keys = torch.cat([cache["keys"], x.detach()]) if "keys" in cache else x.detach()
        cache["keys"] = keys
        return (x * keys.sum()).sin()

    x, cache = leaf(4), dict[str, Tensor]()
    out = use.checkpoint(fn, x, cache=cache)
    out.sum().backward()
    return {"output": out, "gradient": x.grad, "cache": cache}


@_containers("a list in an object that is an argument")
def changes_an_attribute(use: Implementation) -> Any:
    class Cache:
        def __init__(self) -> None:
            self.items = list[Tensor]()

    def fn(x: Tensor, cache: Cache) -> Tensor:
        use.tick()
        cache.items.append(x.detach())
        return (x * float(len(cache.items))).sin()

    x, cache = leaf(4), Cache()
    out = use.checkpoint(fn, x, cache)
    out.sum().backward()
    return {"output": out, "gradient": x.grad, "cache": cache.items}


@case(
    "S6",
    "other values, of the same shapes, in the replay",
    reproducible=False,
    error=clear(r"(?i)\b(bits?|bitwise|values?|contents?|checksum|fingerprint)\b"),
)
def other_values(use: Implementation) -> Any:
    scales = [2.0, 3.0]

    def fn(x: Tensor) -> Tensor:
        use.tick()
        return (x * scales.pop(0)).sin()

    x = leaf(4)
    out = use.configured(bitwise=True)(fn, x)
    out.sum().backward()
    return []

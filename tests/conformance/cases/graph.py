"""G: a segment takes part in whatever autograd can do."""

# mypy: allow-untyped-calls
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from ..implementations import Implementation
from ..registry import Outcome, Verdict, case, check
from .common import leaf, saving


class _ReadsTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.cos())
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (first,) = ctx.saved_tensors
        del first
        (second,) = ctx.saved_tensors
        return grad * second


@case("G1", "a custom Function reads ctx.saved_tensors twice", issues=(82156,))
def reads_twice(use: Implementation) -> Any:
    def fn(x: Tensor) -> Tensor:
        use.tick()
        return _ReadsTwice.apply(x.sin()).exp()  # type: ignore[no-any-return]

    x = leaf(4)
    out = use.checkpoint(fn, x)
    out.sum().backward()
    return {"output": out, "gradient": x.grad}


@case("G2", "except Exception around operators, early stop")
def catches_everything(use: Implementation) -> Any:
    def attempt(x: Tensor) -> Tensor:
        try:
            return x.sin().exp()
        except Exception:
            return x.cos().exp()

    def fn(x: Tensor) -> Tensor:
        use.tick()
        return attempt(attempt(x))

    x = leaf(4)
    out = use.checkpoint(fn, x)
    out.sum().backward()
    return {"output": out, "gradient": x.grad}


@case("G3", "an inference tensor as argument")
def inference_tensor(use: Implementation) -> Any:
    def fn(x: Tensor, shift: Tensor) -> Tensor:
        use.tick()
        return (x + shift).sin()

    with torch.inference_mode():
        shift = torch.randn(4)
    x = leaf(4)
    out = use.checkpoint(fn, x, shift)
    out.sum().backward()
    return {"output": out, "gradient": x.grad}


# torch.func asks for gradients inside of gradients at once, so that there is nothing to save: to
# call the function plainly is as good.


@case("G5", "torch.func.grad over a segment", issues=(122729, 146036), may_skip_replay=True)
def func_grad_over(use: Implementation) -> Any:
    def loss(x: Tensor) -> Tensor:
        use.tick()
        return x.sin().exp().sum()

    return torch.func.grad(lambda x: use.checkpoint(loss, x))(torch.randn(4))


@case("G5", "torch.func.vjp over a segment", issues=(122729, 146036), may_skip_replay=True)
def func_vjp_over(use: Implementation) -> Any:
    def fn(x: Tensor) -> Tensor:
        use.tick()
        return x.sin().exp()

    pair: Any = torch.func.vjp(lambda x: use.checkpoint(fn, x), torch.randn(4))
    out, pull = pair
    return out, pull(torch.ones(4))


@case("G5", "torch.func.jacrev over a segment", issues=(122729, 146036), may_skip_replay=True)
def func_jacrev_over(use: Implementation) -> Any:
    def fn(x: Tensor) -> Tensor:
        use.tick()
        return x.sin().exp() * x.sum()

    return torch.func.jacrev(lambda x: use.checkpoint(fn, x))(torch.randn(3))


@case("G5", "torch.func.grad inside of a segment", issues=(122729, 146036), may_skip_replay=True)
def func_grad_inside(use: Implementation) -> Any:
    def fn(x: Tensor) -> Tensor:
        use.tick()
        slope: Tensor = torch.func.grad(lambda t: t.sin().exp().sum())(x)
        return slope.exp()

    x = leaf(4)
    out = use.checkpoint(fn, x)
    out.sum().backward()
    return {"output": out, "gradient": x.grad}


def _mixed(use: Implementation) -> Any:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        use.tick()
        return (x @ w).sin().exp()

    return fn


@case("G6", "selective checkpointing, backward twice with retain_graph")
def selective_twice(use: Implementation) -> Any:
    x, w = leaf(3, 4), leaf(4, 4)
    out = use.configured(selective=saving("mm"))(_mixed(use), x, w)
    out.sum().backward(retain_graph=True)
    out.sum().backward()
    return {"output": out, "gradient": x.grad, "of the weight": w.grad}


@case("G6", "selective checkpointing, gradient of a gradient")
def selective_double(use: Implementation) -> Any:
    x, w = leaf(3, 4), leaf(4, 4)
    out = use.configured(selective=saving("mm"))(_mixed(use), x, w)
    (first,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    first.square().sum().backward()
    return out, first, x.grad, w.grad


@case("G7", "debug=True together with a context_fn")
def debug_and_selective(use: Implementation) -> Any:
    x, w = leaf(3, 4), leaf(4, 4)
    out = use.configured(selective=saving("mm"), debug=True)(_mixed(use), x, w)
    out.sum().backward()
    return {"output": out, "gradient": x.grad, "of the weight": w.grad}


@case("G8", "overlapping backward calls in one GraphExecGroup", replays=1)
def overlapping(use: Implementation) -> Any:
    """First the gradients of the inputs, then those of the weights, as a pipeline does."""
    x, w = leaf(3, 4), leaf(4, 4)
    out = use.checkpoint(_mixed(use), x, w)
    with use.group():
        (dx,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
        (dw,) = torch.autograd.grad(out.sum(), w)
    return out, dx, dw


@case("G9", "reentrant form, keyword arguments")
def reentrant_keywords(use: Implementation) -> Any:
    def fn(x: Tensor, *, scale: Tensor) -> Tensor:
        use.tick()
        return (x * scale).sin()

    x, scale = leaf(4), leaf(4)
    out = use.reentrant(fn, x, scale=scale)
    out.sum().backward()
    return {"output": out, "gradient": x.grad, "of the keyword": scale.grad}


@case("G9", "reentrant form, nested structures")
def reentrant_nested(use: Implementation) -> Any:
    def fn(inputs: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        use.tick()
        first, second = inputs["pair"]
        return {"sum": (first + second).sin(), "product": (first * second).exp()}

    x, y = leaf(4), leaf(4)
    out = use.reentrant(fn, {"pair": [x, y]})
    sum(part.sum() for part in out.values()).backward()
    return {"output": out, "gradient": x.grad, "of the other": y.grad}


@case("G9", "reentrant form, torch.autograd.grad")
def reentrant_grad(use: Implementation) -> Any:
    x, w = leaf(3, 4), leaf(4, 4)
    out = use.reentrant(_mixed(use), x, w)
    return out, torch.autograd.grad(out.sum(), (x, w))


@case("G9", "reentrant form, backward(inputs=...)")
def reentrant_inputs(use: Implementation) -> Any:
    x, w = leaf(3, 4), leaf(4, 4)
    out = use.reentrant(_mixed(use), x, w)
    out.sum().backward(inputs=[x])
    return {"output": out, "gradient": x.grad, "of the weight": w.grad}


@case("G10", "the user's hooks see every argument that is kept")
def users_hooks(use: Implementation) -> Any:
    """As save_on_cpu does: what goes through the hooks is kept elsewhere, what does not stays."""

    def fn(x: Tensor, nested: list[dict[str, Tensor]], *, keyword: Tensor) -> Tensor:
        use.tick()
        return x.sin() + nested[0]["y"].sin() + keyword.sin()

    leaves = [leaf(4) for _ in range(3)]
    x, y, keyword = (t * 2 for t in leaves)
    names = {t.data_ptr(): n for t, n in ((x, "x"), (y, "nested"), (keyword, "keyword"))}
    packed: set[str] = set()

    def pack(tensor: Tensor) -> Tensor:
        packed.add(names.get(tensor.data_ptr(), "something else"))
        return tensor.detach().clone()

    with saved_tensors_hooks(pack, lambda kept: kept):
        out = use.checkpoint(fn, x, [{"y": y}], keyword=keyword)
    out.sum().backward()
    seen = {n: n in packed for n in sorted(names.values())}
    return {"output": out, "gradients": [t.grad for t in leaves], "seen by the hooks:": seen}


@check("G11", "partial backward frees what only the other branch wants")
def partial_backward(use: Implementation) -> Outcome:
    """The branches are computed one after the other, so the replay for the second runs the first.

    What it computed for the first is of no use once the call has returned: another backward call
    makes it anew.
    """
    recomputed: list[StorageWeakRef] = []
    forwards: list[bool] = []

    def noted(x: Tensor) -> Tensor:
        if len(forwards) > 1:
            recomputed.append(StorageWeakRef(x.untyped_storage()))
        return x

    def fn(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        use.tick()
        forwards.append(True)
        first = noted(noted(y.sin()).exp()).sin()
        return first, noted(noted(x.sin()).exp()).sin()

    x, y = leaf(64), leaf(64)
    first, second = use.checkpoint(fn, x, y)
    (dx,) = torch.autograd.grad(second.sum(), x)
    if not recomputed:
        return Outcome(Verdict.NO_REPLAY, "nothing was recomputed")
    alive, count = sum(not reference.expired() for reference in recomputed), len(recomputed)
    (dy,) = torch.autograd.grad(first.sum(), y)
    if not (torch.equal(dx, _slope(x)) and torch.equal(dy, _slope(y))):
        return Outcome(Verdict.SILENT, "other gradients")
    if alive:
        return Outcome(
            Verdict.SILENT,
            f"{alive} of {count} recomputed tensors are alive after the call",
        )
    return Outcome(Verdict.EXACT)


def _slope(leaf_of_graph: Tensor) -> Tensor:
    t = leaf_of_graph.detach().requires_grad_()
    (slope,) = torch.autograd.grad(t.sin().exp().sin().sum(), t)
    return slope

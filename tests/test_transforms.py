"""torch.func transforms inside of segments, and selective checkpointing more than once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Run, assert_exact, both_forms, checkpointed, grads, leaf, play, top_hooks
from torch import Tensor

from torch_reprise import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    ledger,
)


def slope(x: Tensor) -> Tensor:
    result: Tensor = torch.func.grad(lambda t: t.sin().exp().sum())(x)
    return result


def pulled(x: Tensor) -> Tensor:
    out, pull = torch.func.vjp(lambda t: (t.sin() * t).exp(), x)
    return pull(torch.ones_like(out))[0] * out


def jacobian(x: Tensor) -> Tensor:
    result: Tensor = torch.func.jacrev(lambda t: t.sin() * t.sum())(x)
    return result.sum(1)


def mapped(x: Tensor) -> Tensor:
    return torch.func.vmap(lambda row: row.tanh() * row)(x)


@both_forms
@pytest.mark.parametrize("transform", [slope, pulled, jacobian, mapped])
def test_a_transform_inside(transform: Any, use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        w = leaf(4)

        def function(x: Tensor, w: Tensor) -> Tensor:
            y = torch.tanh(x * w)
            return (y * transform(y).exp()).sigmoid()

        x = leaf(4)
        out = run(function, run(function, x, w), w)
        out.sum().backward()
        return out, grads([x]) if not use_reentrant else [x.grad], w.grad

    # The reentrant form adds the gradients of a tensor that two segments use in another order.
    assert_exact(program, use_reentrant=use_reentrant)


def test_hooks_are_back_after_a_transform_that_raises() -> None:
    seen: list[Any] = []

    def function(x: Tensor) -> Tensor:
        before = top_hooks()

        def raising(t: Tensor) -> Tensor:
            raise KeyError(t.shape)

        with pytest.raises(KeyError):
            torch.func.grad(raising)(x)
        seen.append(top_hooks()[0] is before[0])
        return torch.tanh(x).exp()

    x = leaf(4)
    out = checkpoint(function, x, use_reentrant=False)
    assert top_hooks() is None
    out.sum().backward()
    assert seen == [True, True]


def test_the_users_own_hooks_are_refused_as_always() -> None:
    def function(x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            return slope(x)

    with pytest.raises(RuntimeError, match="saved tensor hooks"):
        checkpoint(function, leaf(4), use_reentrant=False)
    assert top_hooks() is None


def saving(*names: str) -> Any:
    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = op.name().split("::")[1].split(".")[0] in names
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return lambda: create_selective_checkpoint_contexts(policy)


def mixed(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w).sin().exp() * torch.nn.functional.dropout(x, 0.3)


def twice(run: Run) -> Any:
    x, w = leaf(4, 4), leaf(4, 4)
    out = run(mixed, x, w)
    out.sum().backward(retain_graph=True)
    out.square().sum().backward()
    return out, grads([x, w])


def of_a_gradient(run: Run) -> Any:
    x, w = leaf(4, 4), leaf(4, 4)
    out = run(mixed, x, w)
    (first,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    first.square().sum().backward()
    return out, first, grads([x, w])


def shared_under_autocast(run: Run) -> Any:
    x, w = leaf(4, 4), leaf(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(mixed, run(mixed, x, w), w)
    out.sum().backward()
    return out, grads([x, w])


@pytest.mark.parametrize("program", [twice, of_a_gradient, shared_under_autocast])
@pytest.mark.parametrize("names", [("mm",), ("mm", "_to_copy"), ("native_dropout", "sin")])
def test_selective_checkpointing_more_than_once(program: Any, names: tuple[str, ...]) -> None:
    assert_exact(program, context_fn=saving(*names))


def test_what_was_saved_is_freed_when_the_graph_is_not_retained() -> None:
    saved: list[Any] = []

    def contexts() -> Any:
        pair = saving("mm")()
        saved.append(pair[0].storage)
        return pair

    def program(run: Run) -> Any:
        x, w = leaf(4, 4), leaf(4, 4)
        out = run(mixed, x, w)
        out.sum().backward()
        return out, grads([x, w])

    play(program, checkpointed(context_fn=contexts))
    assert saved and ledger.live_segments() == 0
    kept = [e for entries in saved[0].values() for e in entries.values() if hasattr(e, "get_val")]
    assert kept == []


@both_forms
def test_batched_gradients_of_a_segment_that_draws(use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        x = leaf(5)
        y = run(lambda x: torch.nn.functional.dropout(x.sin(), 0.5).exp(), x)
        return torch.autograd.grad(y, x, torch.eye(5), is_grads_batched=True)

    assert_exact(program, use_reentrant=use_reentrant)

"""What was changed in place: as without checkpointing, exact or an error that names it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_reprise import CheckpointError, checkpoint, ledger


def leaf() -> Tensor:
    return torch.linspace(0.1, 1.0, 4).requires_grad_()


def closed_over(x: Tensor, w: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda t: (t * w).sin()


@pytest.mark.parametrize("what", ["a parameter", "a keyword", "an element", "an intermediate"])
def test_a_change_between_forward_and_backward(what: str) -> None:
    x, w = leaf(), leaf()
    kept: list[Tensor] = []

    def fn(t: Tensor, **kwargs: Any) -> Tensor:
        other = kwargs["other"] if "other" in kwargs else kwargs.get("items", [w])[0]
        h = (t * other).exp()
        kept.append(h)
        return h.sin()

    kwargs: dict[str, Any] = {"a keyword": {"other": w}, "an element": {"items": [w]}}.get(what, {})
    changed = "h" if what == "an intermediate" else "w"

    def change() -> None:
        with torch.no_grad():
            (kept[-1] if changed == "h" else w).add_(1.0)

    plain = fn(x, **kwargs)
    change()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        plain.sum().backward()
    y = checkpoint(fn, x, use_reentrant=False, **kwargs)
    change()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    kept.clear()


def test_the_error_names_the_line_and_the_versions() -> None:
    x, w = leaf(), leaf()
    in_a_list = [w]  # of which the function may use another one, as far as we know
    y = checkpoint(lambda t: t * in_a_list[0], x, use_reentrant=False)
    with torch.no_grad():
        w.mul_(2.0)
    message = (
        r"(?s)position \d, float32 \[4\] on cpu, saved at .*test_inplace.py:\d+ in <lambda>, "
        r"needed by MulBackward0; it was at version 0 and is at version 1"
    )
    with pytest.raises(CheckpointError, match=message):
        y.sum().backward()


def test_a_step_of_the_optimizer_before_backward() -> None:
    x, w = leaf(), leaf()
    optimizer = torch.optim.SGD([w], lr=0.1)
    w.grad = torch.ones(4)
    y = checkpoint(closed_over(x, w), x, use_reentrant=False)
    optimizer.step()
    with pytest.raises(CheckpointError, match="modified by an inplace operation"):
        y.sum().backward()


def test_hooks_that_keep_values_allow_changes() -> None:
    x, w = leaf(), leaf()

    def program(run: Callable[..., Tensor]) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            y = run(lambda t: (t * 2).sin(), x.exp())
        (grad,) = torch.autograd.grad(y.sum(), x)
        return grad

    found = program(lambda fn, t: checkpoint(fn, t, use_reentrant=False))
    assert torch.equal(found, program(lambda fn, t: fn(t)))
    assert w.grad is None


def test_an_argument_that_the_function_changes() -> None:
    def fn(t: Tensor) -> Tensor:
        t.mul_(2.0)
        return t.sin().exp()

    x = leaf()
    y = checkpoint(fn, x * 1, use_reentrant=False)
    with pytest.raises(CheckpointError, match="changed argument 0 in place"):
        y.sum().backward()
    del y
    assert ledger.live_segments() == 0  # no cycle through the argument's new history


def test_backward_in_inference_mode() -> None:
    for use_reentrant in (False, True):
        x = leaf()
        y = checkpoint(lambda t: t.sin().exp(), x, use_reentrant=use_reentrant)
        loss = y.sum()
        with torch.inference_mode():
            loss.backward()
        (expected,) = torch.autograd.grad(x.sin().exp().sum(), x)
        assert x.grad is not None and torch.equal(x.grad, expected)


def test_reentrant_in_reentrant_with_a_leaf_of_its_own() -> None:
    x, w = leaf(), leaf()

    def inner(t: Tensor) -> Tensor:
        return (t * w).sin()

    def outer(t: Tensor) -> Tensor:
        return checkpoint(inner, t.exp(), use_reentrant=True).exp()

    y = checkpoint(outer, x * (w * 1), use_reentrant=True)
    with pytest.raises(CheckpointError, match="reaches by itself"):
        y.sum().backward(inputs=[w])


def test_deeply_nested_arguments_leave_the_recursion_limit_alone() -> None:
    nested: Any = [leaf()]
    # CPython 3.12 and 3.13 count calls in C by themselves, some 10,000 of them; 3.14 looks at what
    # is left of the stack.
    for _ in range(20_000 if sys.version_info < (3, 14) else 300_000):
        nested = [nested]
    x = leaf()
    for _ in range(3):
        with pytest.raises(RecursionError):
            checkpoint(lambda d: x.sin(), nested, use_reentrant=False)

    def depth(n: int) -> int:
        return 0 if n == 0 else 1 + depth(n - 1)

    assert depth(400) == 400
    while nested and isinstance(nested[0], list):  # taken apart flat: its end is recursive too
        nested = nested[0]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_function_that_draws_and_puts_the_generator_back(use_reentrant: bool) -> None:
    def forked(t: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            noise = torch.rand(4)
        return (t.sin() * noise).exp()

    def rewound(t: Tensor) -> Tensor:
        state = torch.get_rng_state()
        h = (t * torch.rand(4)).sin()
        h = h * torch.rand(40)[:4]
        torch.set_rng_state(state)
        torch.rand(2)
        return h.exp()

    for fn in (forked, rewound):
        results = []
        for run in (lambda f, t: f(t), None):
            torch.manual_seed(5)
            x = leaf()
            y = fn(x) if run else checkpoint(fn, x, use_reentrant=use_reentrant)
            torch.rand(7)
            y.sum().backward()
            assert x.grad is not None
            results.append((x.grad, torch.get_rng_state()))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

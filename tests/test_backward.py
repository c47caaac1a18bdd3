"""Ways to run backward over a segment: several times, partly, twice over, inside, in threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    Run,
    assert_exact,
    both_forms,
    checkpointed,
    grads,
    in_threads,
    leaf,
    message_of,
)
from torch import Tensor, nn
from torch.nn.functional import dropout

from torch_reprise import GraphExecGroup, checkpoint, ledger


def mixed(x: Tensor, w: Tensor) -> Tensor:
    return dropout(torch.tanh(x @ w), 0.4).exp() * w


def two_outputs(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.sin(x @ w)
    return dropout(h.exp(), 0.3), torch.tanh(h * w)


# Several backward calls.


@both_forms
@pytest.mark.parametrize("count", [2, 4])
def test_each_backward_call_replays_once(count: int, use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        x, w = leaf(4, 4), leaf(4, 4)
        out = run(mixed, x, w)
        steps = []
        for index in range(count):
            out.sum().backward(retain_graph=index + 1 < count)
            steps.append(grads([x, w]))
        return out, steps

    assert_exact(program, replays=count, use_reentrant=use_reentrant)


@both_forms
def test_several_outputs_in_one_backward_call_replay_once(use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        x, w = leaf(4, 4), leaf(4, 4)
        a, b = run(two_outputs, x, w)
        torch.autograd.backward([a, b], [torch.ones_like(a), torch.randn(4, 4)])
        return a, b, grads([x, w])

    assert_exact(program, replays=1, use_reentrant=use_reentrant)


@both_forms
def test_a_second_backward_call_without_retain_graph_is_refused(use_reentrant: bool) -> None:
    x, w = leaf(4, 4), leaf(4, 4)
    out = checkpointed(use_reentrant=use_reentrant)(mixed, x, w)
    out.sum().backward()
    found = grads([x, w])
    text = message_of(RuntimeError, lambda: out.sum().backward())
    assert "backward through the graph a second time" in text
    for now, then in zip(grads([x, w]), found, strict=True):
        assert torch.equal(now, then)


def test_one_output_now_and_the_other_later() -> None:
    def program(run: Run) -> Any:
        x, w = leaf(4, 4), leaf(4, 4)
        a, b = run(two_outputs, x, w)
        b.sum().backward(retain_graph=True)
        first = grads([x, w])
        torch.rand(3)
        a.sum().backward()
        return first, grads([x, w])

    assert_exact(program, replays=2)


def test_one_output_never() -> None:
    def program(run: Run) -> Any:
        x, w = leaf(4, 4), leaf(4, 4)
        a, _ = run(two_outputs, x, w)
        a.sum().backward()
        return grads([x, w])

    assert_exact(program, replays=1)


def test_the_graph_in_front_of_and_behind_a_segment() -> None:
    def program(run: Run) -> Any:
        x, w = leaf(4, 4), leaf(4, 4)
        h = torch.sin(x @ w)
        h.retain_grad()
        out = run(mixed, h, w)
        out.retain_grad()
        ((out * x).exp().mean() + h.sum()).backward()
        return out, h.grad, out.grad, grads([x, w])

    assert_exact(program, replays=1)


# GraphExecGroup.


def chain(run: Run) -> tuple[Tensor, Tensor, Tensor]:
    x, w = leaf(4, 4), leaf(4, 4)
    return x, w, run(lambda a, b: torch.tanh(torch.sin(a) @ b), x, w)


def test_a_group_shares_one_replay() -> None:
    def program(run: Run) -> Any:
        x, w = leaf(4, 4), leaf(4, 4)
        a, b = run(lambda s, t: (torch.sin(s).exp(), torch.cos(t).tanh()), x, w)
        with GraphExecGroup():
            torch.autograd.backward(a.sum(), retain_graph=True)
            torch.autograd.backward(b.sum())
        return a, b, grads([x, w])

    assert_exact(program, replays=1)


def test_a_group_allows_calls_that_need_the_same_tensors() -> None:
    """Zero-bubble pipelines ask for the input's gradient first and the weight's later."""

    def program(run: Run) -> Any:
        x, w, out = chain(run)
        with GraphExecGroup():
            (dx,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
            (dw,) = torch.autograd.grad(out.sum(), w)
        return out, dx, dw

    assert_exact(program, replays=1)


def test_outside_a_group_and_in_the_next_one_it_replays_anew() -> None:
    def program(run: Run) -> Any:
        x, w, out = chain(run)
        with GraphExecGroup():
            out.sum().backward(retain_graph=True)
        out.sum().backward(retain_graph=True)
        with GraphExecGroup():
            out.sum().backward()
        return out, grads([x, w])

    assert_exact(program, replays=3)


def test_groups_do_not_nest() -> None:
    with GraphExecGroup():
        with pytest.raises(RuntimeError, match="cannot be nested"):
            GraphExecGroup().__enter__()
    with GraphExecGroup():  # the refused one left nothing behind
        pass


# autograd.grad, inputs=, higher derivatives.


def test_autograd_grad_for_arguments_and_parameters() -> None:
    def program(run: Run) -> Any:
        linear, x, unused = nn.Linear(4, 4), leaf(3, 4), leaf(2)
        out = run(lambda h: torch.tanh(linear(h)).exp(), x)
        found = torch.autograd.grad(
            out.sum(), [x, linear.weight, unused, linear.bias], allow_unused=True
        )
        return out, list(found), grads(linear), grads([x])

    assert_exact(program, replays=1)


@pytest.mark.parametrize("which", [0, 1], ids=["input", "weight"])
def test_inputs_of_backward(which: int) -> None:
    def program(run: Run) -> Any:
        x, w = leaf(4, 4), leaf(4, 4)
        out = run(mixed, x, w)
        out.sum().backward(inputs=[(x, w)[which]])
        return out, grads([x, w])

    assert_exact(program, replays=1)


def test_a_gradient_for_an_intermediate_tensor_needs_no_replay_of_what_lies_before() -> None:
    def program(run: Run) -> Any:
        x, w = leaf(4, 4), leaf(4, 4)
        h = run(mixed, x, w)
        out = run(mixed, h, w)
        return torch.autograd.grad(out.sum(), h)[0]

    assert_exact(program, replays=1)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("early_stop", [True, False])
def test_higher_derivatives(order: int, early_stop: bool) -> None:
    def program(run: Run) -> Any:
        x, w = leaf(3, 3), leaf(3, 3)
        out = run(lambda a, b: dropout(torch.sin(a @ b).exp(), 0.3) * torch.tanh(a), x, w)
        found, value = [], out.sum()
        for index in range(order):
            slopes = torch.autograd.grad(value, [x, w], create_graph=index + 1 < order)
            found.extend(slopes)
            value = sum((s * s.detach().sin()).sum() for s in slopes)
        return out, found

    assert_exact(program, early_stop=early_stop)


def test_a_gradient_penalty() -> None:
    def program(run: Run) -> Any:
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        x = leaf(5, 4)
        score = run(model, x).sum()
        (slope,) = torch.autograd.grad(score, x, create_graph=True)
        (score + (slope.norm(dim=1) - 1).square().mean()).backward()
        return score, slope, grads([x]), grads(model)

    assert_exact(program)


def test_jacobians() -> None:
    def program(run: Run) -> Any:
        x, w = leaf(3), leaf(3)

        def function(a: Tensor, b: Tensor) -> Tensor:
            return run(lambda s, t: torch.sin(s * t).cumsum(0), a, b)

        jacobian = torch.autograd.functional.jacobian(function, (x, w))
        hessian = torch.autograd.functional.hessian(lambda a: function(a, w).sum(), x)
        return jacobian, hessian

    assert_exact(program)


# Inside the function, and in its neighbourhood.


def gradient_step(x: Tensor, w: Tensor) -> Tensor:
    h = torch.sin(x @ w)
    (slope,) = torch.autograd.grad(h.exp().sum(), x, create_graph=True)
    return torch.tanh(x - 0.1 * slope)


def gradient_as_constant(x: Tensor, w: Tensor) -> Tensor:
    h = torch.sin(x @ w)
    (slope,) = torch.autograd.grad(h.exp().sum(), h, retain_graph=True)
    return h.cos() * slope


def own_graph(x: Tensor, w: Tensor) -> Tensor:
    local = x.detach().clone().requires_grad_()
    dropout(local.sin() * local, 0.5).sum().backward()
    assert local.grad is not None
    return torch.tanh(x @ w) * local.grad


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("function", [gradient_step, gradient_as_constant, own_graph])
def test_gradients_taken_inside(function: Callable[..., Tensor], early_stop: bool) -> None:
    def program(run: Run) -> Any:
        x, w = leaf(4, 4), leaf(4, 4)
        out = run(function, x, w)
        out.sum().backward()
        return out, grads([x, w])

    assert_exact(program, early_stop=early_stop)


@both_forms
def test_a_function_that_is_itself_a_training_step(use_reentrant: bool) -> None:
    def step(x: Tensor, model: nn.Module) -> Tensor:
        with torch.enable_grad():
            local = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(model(local).square().sum(), local)
        return model(x) * slope

    def program(run: Run) -> Any:
        model, x = nn.Linear(4, 4), leaf(2, 4)
        out = run(step, x, model)
        out.sum().backward()
        return out, grads([x]), grads(model)

    assert_exact(program, use_reentrant=use_reentrant)


def test_tensor_hooks_registered_inside_run_once() -> None:
    calls: list[str] = []

    def function(x: Tensor) -> Tensor:
        h = x.sin()
        h.register_hook(lambda grad: calls.append("tensor") or grad * 2)
        out = h.exp()
        out.grad_fn.register_prehook(lambda given: calls.append("node"))
        return out

    def program(run: Run) -> Any:
        calls.clear()
        x = leaf(4)
        x.register_hook(lambda grad: calls.append("leaf") or grad + 1)
        out = run(function, x)
        out.sum().backward()
        return out, grads([x]), list(calls)

    assert_exact(program, replays=1)


# Threads.


def test_threads_with_their_own_graphs() -> None:
    def step(run: Run, x: Tensor, weights: list[Tensor]) -> list[Tensor]:
        h = x
        for w in weights:
            h = run(lambda a, b: torch.tanh(torch.sin(a @ b) @ b).exp(), h, w)
        return [h.detach(), *torch.autograd.grad(h.sum(), [x, *weights])]

    count = 4
    inputs = [leaf(8, 8) for _ in range(count)]
    weights = [leaf(8, 8) for _ in range(3)]
    expected = [step(lambda f, *a: f(*a), x, weights) for x in inputs]
    found: dict[int, list[list[Tensor]]] = {}

    def work(index: int) -> None:
        found[index] = [step(checkpointed(), inputs[index], weights) for _ in range(5)]

    before = ledger.replays()
    in_threads(count, work)
    assert ledger.replays() == before + count * 5 * 3
    for index in range(count):
        for run in found[index]:
            for have, want in zip(run, expected[index], strict=True):
                assert torch.equal(have, want)


def test_threads_share_one_graph() -> None:
    x, w = leaf(8, 8), leaf(8, 8)
    out = checkpoint(mixed, x, w, use_reentrant=False)
    total = out.sum()
    expected = torch.autograd.grad(total, [x, w], retain_graph=True)
    count, calls = 4, 3
    found: list[tuple[Tensor, ...]] = []
    lock = threading.Lock()

    def work(index: int) -> None:
        for _ in range(calls):
            got = torch.autograd.grad(total, [x, w], retain_graph=True)
            with lock:
                found.append(got)

    before, state = ledger.replays(), torch.get_rng_state()
    in_threads(count, work)
    assert ledger.replays() == before + count * calls, "each graph task replays for itself"
    assert torch.equal(torch.get_rng_state(), state), "each replay puts the generator back"
    assert len(found) == count * calls
    for got in found:
        for have, want in zip(got, expected, strict=True):
            assert torch.equal(have, want)


def test_backward_in_another_thread_than_the_forward() -> None:
    def program(run: Run) -> Any:
        x, w = leaf(4, 4), leaf(4, 4)
        out = run(mixed, x, w)
        in_threads(1, lambda _: out.sum().backward())
        return out, grads([x, w])

    assert_exact(program, replays=1)

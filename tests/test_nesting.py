"""Segments inside segments, in both forms and mixed, and where the replay of each one stops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Run, assert_exact, both_forms, checkpointed, grads, leaf, plain
from torch import Tensor, nn
from torch.nn.functional import dropout

from torch_reprise import checkpoint, ledger, set_checkpoint_early_stop

# The forward of a reentrant segment runs without gradients, so the arguments of one inside it
# require none; torch warns about that, and whether we do is not what is tested here.
inner_may_warn = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


def tower(run: Run, h: Tensor, weights: list[Tensor], tail: bool) -> Tensor:
    """A segment a weight, each inside the one before; with `tail` they work on the way out too."""
    w, *rest = weights

    def level(h: Tensor) -> Tensor:
        h = dropout(torch.tanh(h @ w), 0.2)
        h = tower(run, h, rest, tail) if rest else torch.sigmoid(h)
        return dropout(torch.sin(h) * w, 0.1) if tail else h

    return run(level, h)


def leaves(count: int) -> list[Tensor]:
    return [leaf(4, 4) for _ in range(count)]


@pytest.mark.parametrize("tail", [False, True], ids=["head", "head and tail"])
@pytest.mark.parametrize("depth", [2, 3, 20])
@inner_may_warn
@both_forms
def test_depth(depth: int, tail: bool, use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        x, *weights = leaves(depth + 1)
        out = tower(run, x, weights, tail)
        out.sum().backward()
        return out, grads([x, *weights])

    assert_exact(program, replays=depth, use_reentrant=use_reentrant)


@pytest.mark.parametrize("depth", [2, 3, 20])
def test_depth_without_early_stop(depth: int) -> None:
    def program(run: Run) -> Any:
        x, *weights = leaves(depth + 1)
        out = tower(run, x, weights, tail=True)
        out.sum().backward()
        return out, grads([x, *weights])

    assert_exact(program, replays=depth, early_stop=False)


@pytest.mark.parametrize("outer", [False, True], ids=["outer hooks", "outer reentrant"])
@inner_may_warn
@pytest.mark.parametrize("inner", [False, True], ids=["inner hooks", "inner reentrant"])
def test_one_form_inside_the_other(outer: bool, inner: bool) -> None:
    def program(run: Run) -> Any:
        def call(use_reentrant: bool) -> Run:
            return plain if run is plain else checkpointed(use_reentrant=use_reentrant)

        first, second, x = nn.Linear(4, 4), nn.Linear(4, 4), leaf(3, 4)

        def inside(h: Tensor) -> Tensor:
            return dropout(torch.tanh(second(h)), 0.4).exp()

        def outside(h: Tensor) -> Tensor:
            return dropout(torch.sin(call(inner)(inside, first(h))), 0.3) * h

        out = call(outer)(outside, x)
        out.sum().backward()
        return out, grads([x]), grads(first), grads(second)

    assert_exact(program, replays=2)


@inner_may_warn
@both_forms
def test_siblings_inside_one_segment(use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))
        x = leaf(3, 5)

        def branch(layer: nn.Module) -> Callable[[Tensor], Tensor]:
            return lambda h: dropout(torch.tanh(layer(h)), 0.2)

        def outer(h: Tensor) -> Tensor:
            a = run(branch(layers[0]), h)
            b = run(branch(layers[1]), h) * a
            c = run(branch(layers[2]), b)
            return a + run(branch(layers[3]), c).sin()

        out = run(outer, x)
        out.square().sum().backward()
        return out, grads([x]), grads(layers)

    assert_exact(program, replays=5, use_reentrant=use_reentrant)


def test_an_inner_segment_whose_output_is_dropped() -> None:
    def program(run: Run) -> Any:
        x, w = leaf(4), leaf(4)

        def outer(t: Tensor) -> Tensor:
            run(lambda v: (v * w).exp().sin(), t)
            return dropout(run(lambda v: torch.tanh(v * w), t.sin()), 0.5)

        out = run(outer, x)
        out.sum().backward()
        return out, grads([x, w])

    assert_exact(program)
    assert_exact(program, early_stop=False)


def test_inputs_of_an_inner_segment_in_keywords_and_containers() -> None:
    def program(run: Run) -> Any:
        x, w = leaf(4, 4), leaf(4, 4)

        def inner(*, pack: Any, scale: Tensor) -> Any:
            return {"out": torch.tanh(pack["a"] @ pack["b"][0]) * scale, "scale": scale}

        def outer(t: Tensor, *, weight: Tensor) -> Tensor:
            found = run(inner, pack={"a": t.sin(), "b": (weight,)}, scale=t.exp())
            return found["out"].exp() * found["scale"]

        out = run(outer, x, weight=w)
        out.sum().backward()
        return out, grads([x, w])

    assert_exact(program, replays=2)


def test_gradients_taken_inside_an_inner_segment() -> None:
    def program(run: Run) -> Any:
        x, w = leaf(4), leaf(4)

        def inner(t: Tensor) -> Tensor:
            (slope,) = torch.autograd.grad((t * w).sin().sum(), t, create_graph=True)
            return slope.exp() * t

        out = run(lambda t: run(inner, t.tanh()).sin(), x)
        out.sum().backward()
        return out, grads([x, w])

    assert_exact(program)
    assert_exact(program, early_stop=False)


def test_double_backward_through_nested_segments() -> None:
    def program(run: Run) -> Any:
        x, *weights = leaves(4)
        out = tower(run, x, weights, tail=True)
        (first,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), [x, *weights])
        return out, first, list(second)

    assert_exact(program)
    assert_exact(program, early_stop=False)


def test_two_backward_calls_replay_every_level_twice() -> None:
    def program(run: Run) -> Any:
        x, *weights = leaves(6)
        out = tower(run, x, weights, tail=True)
        out.sum().backward(retain_graph=True)
        out.sum().backward()
        return out, grads([x, *weights])

    assert_exact(program, replays=10)


@inner_may_warn
def test_a_module_of_blocks_with_checkpointed_parts() -> None:
    """What models do: each block a segment, its attention a segment of its own."""

    class Block(nn.Module):
        def __init__(self, run: Run) -> None:
            super().__init__()
            self.run = run
            self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
            self.norm = nn.LayerNorm(8)
            self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 8))

        def attend(self, h: Tensor) -> Tensor:
            h = self.norm(h)
            return self.attention(h, h, h, need_weights=False)[0]

        def forward(self, h: Tensor) -> Tensor:
            h = h + self.run(self.attend, h)
            return h + self.mlp(h)

    def program(run: Run) -> Any:
        blocks = nn.ModuleList(Block(run) for _ in range(2))
        x = leaf(2, 5, 8)
        h = x
        for block in blocks:
            h = run(block, h)
        h.square().mean().backward()
        return h, grads([x]), grads(blocks)

    assert_exact(program, replays=4)
    assert_exact(program, replays=4, use_reentrant=True)


# Where a replay stops.


def steps(log: list[str], *, swallow: type[BaseException] | None) -> Callable[[Tensor], Tensor]:
    """A function that logs how far it got; `swallow` is what user code catches around each part."""

    def guarded(h: Tensor, name: str, operation: Callable[[Tensor], Tensor]) -> Tensor:
        if swallow is None:
            h = operation(h)
        else:
            try:
                h = operation(h)
            except swallow:
                log.append(f"{name} swallowed")
        log.append(name)
        return h

    def function(x: Tensor) -> Tensor:
        h = guarded(x, "sin", torch.sin)
        h = guarded(h, "exp", torch.exp)
        return guarded(h, "add", lambda t: t + 1)

    return function


@pytest.mark.parametrize(
    ("early_stop", "replayed"),
    [(True, ["sin"]), (False, ["sin", "exp", "add"])],
    ids=["early", "complete"],
)
@pytest.mark.parametrize("how", ["option", "context manager"])
def test_how_far_the_function_runs(early_stop: bool, replayed: list[str], how: str) -> None:
    log: list[str] = []
    x = leaf(3)
    if how == "option":
        out = checkpoint(steps(log, swallow=None), x, use_reentrant=False, early_stop=early_stop)
    else:
        with set_checkpoint_early_stop(early_stop):
            out = checkpoint(
                steps(log, swallow=None), x, use_reentrant=False, early_stop=not early_stop
            )
    assert log == ["sin", "exp", "add"]
    log.clear()
    out.sum().backward()
    assert log == replayed, "exp saves its result, and is the last operation that saves anything"


def test_early_stop_context_managers_nest() -> None:
    log: list[str] = []
    with set_checkpoint_early_stop(False):
        with set_checkpoint_early_stop(True):
            pass
        x = leaf(3)
        out = checkpoint(steps(log, swallow=None), x, use_reentrant=False)
    log.clear()
    out.sum().backward()
    assert log == ["sin", "exp", "add"]


def test_the_stop_is_no_exception_that_except_exception_catches() -> None:
    log: list[str] = []
    x = leaf(3)
    out = checkpoint(steps(log, swallow=Exception), x, use_reentrant=False)
    log.clear()
    before = ledger.replays()
    out.sum().backward()
    assert log == ["sin"] and ledger.replays() == before + 1
    assert torch.equal(x.grad, torch.autograd.grad((x.sin().exp() + 1).sum(), x)[0])


def test_a_bare_except_in_user_code_does_no_harm() -> None:
    log: list[str] = []
    x = leaf(3)
    out = checkpoint(steps(log, swallow=BaseException), x, use_reentrant=False)
    assert log == ["sin", "exp", "add"]
    before = ledger.replays()
    out.sum().backward()
    assert ledger.replays() == before + 1
    assert torch.equal(x.grad, torch.autograd.grad((x.sin().exp() + 1).sum(), x)[0])


@pytest.mark.parametrize("swallow", [Exception, BaseException], ids=["Exception", "bare"])
def test_a_swallowed_stop_in_nested_segments(swallow: type[BaseException]) -> None:
    def program(run: Run) -> Any:
        x, w = leaf(4), leaf(4)

        def inner(t: Tensor) -> Tensor:
            try:
                return dropout(torch.tanh(t * w), 0.5)
            except swallow:
                return t

        def outer(t: Tensor) -> Tensor:
            try:
                h = run(inner, dropout(t.sin(), 0.5))
            except swallow:
                h = t
            try:
                return (h * w).exp()
            except swallow:
                return h

        out = run(outer, x)
        out.sum().backward()
        return out, grads([x, w])

    assert_exact(program, replays=2)


def test_a_stop_that_user_code_turns_into_another_error() -> None:
    def function(x: Tensor) -> Tensor:
        try:
            return x.sin().exp()
        except BaseException as error:
            raise ValueError("could not compute") from error

    x = leaf(3)
    checkpoint(function, x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, torch.autograd.grad(x.sin().exp().sum(), x)[0])


def test_finally_and_exit_run_when_a_replay_stops() -> None:
    log: list[str] = []

    class Logged:
        def __enter__(self) -> None:
            log.append("enter")

        def __exit__(self, *args: object) -> None:
            log.append("exit")

    def function(x: Tensor) -> Tensor:
        with Logged():
            try:
                return x.sin().exp()
            finally:
                log.append("finally")

    x = leaf(3)
    out = checkpoint(function, x, use_reentrant=False)
    out.sum().backward()
    assert log == ["enter", "finally", "exit"] * 2


def test_a_stop_before_a_nested_segment_does_not_run_it() -> None:
    """The outer segment has all that it needs when the inner one saves its input."""
    calls = 0

    def first(x: Tensor) -> Tensor:
        return x.sin().exp()

    def second(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x.cos().exp()

    def outer(x: Tensor) -> Tensor:
        inner: Tensor = checkpoint(first, x, use_reentrant=False)
        result: Tensor = checkpoint(second, inner, use_reentrant=False)
        return result

    checkpoint(outer, leaf(4), use_reentrant=False).sum().backward()
    assert calls == 2


@pytest.mark.parametrize("depth", [1, 5, 20])
def test_replays_grow_with_the_depth_and_not_with_its_square(depth: int) -> None:
    def recurse(x: Tensor, left: int) -> Tensor:
        if left == 0:
            return x.sin()
        result: Tensor = checkpoint(recurse, (x * 1.01).sin(), left - 1, use_reentrant=False)
        return result

    before = ledger.replays()
    recurse(leaf(4), depth).sum().backward()
    assert ledger.replays() - before == depth

"""Where a replay leaves its function: at the operator that saves the last tensor, on either way.

Small operators may finish, and the exception is raised where they return to (csrc/bindings/
early_stop.h); large ones it is thrown through. What the program sees must be the same.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import assert_exact, checkpointed, in_threads, leaf
from torch import Tensor

import torch_reprise
from torch_reprise import ledger

# The exception is raised after the operator, or thrown through it.
SIZES = pytest.mark.parametrize("size", [4, 400], ids=["finishes", "thrown through"])


class Marks:
    """What a function did: one list for each of its calls."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def begin(self) -> None:
        self.calls.append([])

    def __call__(self, mark: str) -> None:
        self.calls[-1].append(mark)


def forward_and_replay(fn: Callable[[Tensor], Tensor], size: int) -> None:
    x = leaf(size, size)
    before = ledger.replays()
    checkpointed()(fn, x).sum().backward()
    assert ledger.replays() == before + 1


@SIZES
def test_nothing_after_the_last_operator_runs_in_a_replay(size: int) -> None:
    marks = Marks()

    def fn(x: Tensor) -> Tensor:
        marks.begin()
        y = torch.tanh(x)
        marks("after")
        return y

    forward_and_replay(fn, size)
    assert marks.calls == [["after"], []]


@SIZES
def test_the_exception_comes_out_of_the_call(size: int) -> None:
    marks = Marks()

    @contextmanager
    def noting() -> Iterator[None]:
        marks("enter")
        try:
            yield
        except BaseException as error:
            marks(type(error).__name__)
            raise
        finally:
            marks("exit")

    def inner(x: Tensor) -> Tensor:
        with noting():
            return torch.tanh(x)

    def fn(x: Tensor) -> Tensor:
        marks.begin()
        try:
            return inner(x)
        finally:
            marks("finally")

    forward_and_replay(fn, size)
    assert marks.calls == [
        ["enter", "exit", "finally"],
        ["enter", "EarlyStop", "exit", "finally"],
    ]


@SIZES
def test_a_context_around_an_operator_without_a_call_is_left(size: int) -> None:
    """After `x * x` the interpreter goes on to `__exit__`, which must not be interrupted."""
    left = []

    class Context:
        def __enter__(self) -> None:
            left.append(False)

        def __exit__(self, *exc: object) -> None:
            left[-1] = True

    def fn(x: Tensor) -> Tensor:
        with Context():
            y = x * x
        return y

    forward_and_replay(fn, size)
    assert left == [True, True]


@SIZES
def test_callbacks_of_what_dies_with_the_call_are_not_hit(
    size: int, recwarn: pytest.WarningsRecorder
) -> None:
    """The argument dies when the call returns, before the exception: its callbacks are Python."""
    ended: list[bool] = []

    def fn(x: Tensor) -> Tensor:
        def fresh() -> Tensor:
            t = x * 2
            weakref.finalize(t, lambda: ended.append(True))
            return t

        return torch.tanh(fresh())

    forward_and_replay(fn, size)
    gc.collect()
    assert ended == [True, True]
    assert not recwarn.list


@SIZES
def test_finalizers_that_the_collector_runs_are_not_hit(size: int) -> None:
    ended: list[bool] = []

    class Cycle:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            ended.append(True)

    def fn(x: Tensor) -> Tensor:
        for _ in range(5):
            Cycle()
        return torch.tanh(x)

    thresholds = gc.get_threshold()
    gc.set_threshold(1)
    try:
        forward_and_replay(fn, size)
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()
    assert ended == [True] * 10


@SIZES
def test_swallowed_by_a_bare_except(size: int) -> None:
    marks = Marks()

    def fn(x: Tensor) -> Tensor:
        marks.begin()
        try:
            return torch.tanh(x)
        except BaseException as error:
            marks(type(error).__name__)
        return torch.tanh(x) + 1

    x = leaf(size, size)
    checkpointed()(fn, x).sum().backward()
    assert marks.calls == [[], ["EarlyStop"]]
    # Nothing is left to be raised later.
    for _ in range(100):
        torch.tanh(torch.ones(1))


def test_a_builtin_is_all_there_is_to_end() -> None:
    for _ in range(3):
        assert_exact(lambda run: torch.autograd.grad(run(torch.tanh, x := leaf(4)).sum(), x))


def test_map_and_partial_in_between() -> None:
    """The operator is called by code in C, which goes on before it returns to the frame."""

    def program(run: Callable[..., Any]) -> Any:
        x = leaf(3, 3)

        def fn(x: Tensor) -> Tensor:
            return torch.stack(list(map(torch.tanh, [x, x + 1, x + 2])))

        run(fn, x).sum().backward()
        return x.grad

    assert_exact(program)


@SIZES
def test_on_another_thread(size: int) -> None:
    marks: dict[int, Marks] = {}

    def work(index: int) -> None:
        mine = marks[index] = Marks()

        def fn(x: Tensor) -> Tensor:
            mine.begin()
            y = torch.tanh(x)
            mine("after")
            return y

        for _ in range(20):
            # Drawing it here, while others replay, would be another matter (docs/rng.md).
            x = torch.ones(size, size, requires_grad=True)
            checkpointed()(fn, x).sum().backward()

    in_threads(3, work)
    assert [mine.calls for mine in marks.values()] == [[["after"], []] * 20] * 3


@SIZES
def test_nested_replays_stop_where_they_should(size: int) -> None:
    marks = Marks()

    def inner(x: Tensor) -> Tensor:
        y = torch.tanh(x)
        marks("inner")
        return y

    def outer(x: Tensor) -> Tensor:
        marks.begin()
        y = torch_reprise.checkpoint(inner, x.sin(), use_reentrant=False)
        y = torch.exp(y)
        marks("outer")
        return y

    x = leaf(size, size)
    checkpointed()(outer, x).sum().backward()
    # The replay of the outer one has a forward of the inner one, and stops in exp.
    assert marks.calls == [["inner", "outer"], ["inner"]]


@SIZES
@pytest.mark.parametrize("how", ["except", "cause", "context manager"])
def test_a_function_that_ends_the_program_on_any_error_does_not(size: int, how: str) -> None:
    @contextmanager
    def exiting() -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            raise SystemExit("no result") from error

    def fn(x: Tensor) -> Tensor:
        if how == "context manager":
            with exiting():
                return torch.exp(x).sin()
        try:
            return torch.exp(x).sin()
        except BaseException as error:
            if how == "cause":
                raise SystemExit("no result") from error
            sys.exit("no result")

    forward_and_replay(fn, size)


@SIZES
def test_an_interrupt_during_the_stop_is_the_users(size: int) -> None:
    def fn(x: Tensor) -> Tensor:
        try:
            return torch.exp(x).sin()
        except BaseException as error:
            raise KeyboardInterrupt from error

    out = checkpointed()(fn, leaf(size, size))
    with pytest.raises(KeyboardInterrupt):
        out.sum().backward()


def test_an_error_of_the_operator_that_finishes_is_dropped() -> None:
    """After its last tensor is recomputed nothing that the function does counts."""
    calls: list[int] = []

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return grad * x

    def fn(x: Tensor) -> Tensor:
        calls.append(1)
        y = Fails.apply(x.sin())
        if len(calls) > 1:
            raise ValueError("after the last saved tensor")
        return y

    x = leaf(4)
    checkpointed()(fn, x).sum().backward()
    assert x.grad is not None and len(calls) == 2

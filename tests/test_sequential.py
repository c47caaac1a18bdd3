"""checkpoint_sequential: how functions are divided into segments, and what it accepts."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Run, assert_exact, both_forms, grads, leaf, message_of, plain, top_hooks
from torch import Tensor, nn

from torch_reprise import checkpoint_sequential, ledger


def layers(count: int) -> list[nn.Module]:
    return [
        nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.2)) if i % 2 else nn.Linear(4, 4)
        for i in range(count)
    ]


def run_all(functions: Any, x: Tensor) -> Tensor:
    for function in functions:
        x = function(x)
    return x


class Probes:
    """Functions that note whether each of them runs in a segment, and the replays' grouping."""

    def __init__(self, count: int) -> None:
        self.calls: list[int] = []
        self.under_hooks: list[bool] = []
        self.functions = [functools.partial(self.probe, index) for index in range(count)]

    def probe(self, index: int, x: Tensor) -> Tensor:
        self.calls.append(index)
        self.under_hooks.append(top_hooks() is not None)
        return torch.sin(x)

    def chunks(self, segments: int) -> list[int]:
        """The sizes of the chunks, first to last; the last one is not checkpointed."""
        count = len(self.functions)
        x = leaf(3)
        out = checkpoint_sequential(self.functions, segments, x, use_reentrant=False)
        in_segment = self.under_hooks[:count]
        last = in_segment.count(False)
        assert in_segment == [True] * (count - last) + [False] * last
        # In backward the chunks are replayed from the last to the first, each from its own start:
        # where the index does not go on by one, another chunk begins.
        self.calls.clear()
        with_hooks: list[list[int]] = []
        out.sum().backward()
        for index in self.calls:
            if with_hooks and index == with_hooks[-1][-1] + 1:
                with_hooks[-1].append(index)
            else:
                with_hooks.append([index])
        assert sorted(i for chunk in with_hooks for i in chunk) == list(range(count - last))
        return [len(chunk) for chunk in reversed(with_hooks)] + [last]


@pytest.mark.parametrize("segments", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("kind", ["Sequential", "ModuleList", "list", "tuple", "deque"])
@both_forms
def test_it_is_exact(segments: int, kind: str, use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        modules = layers(7)
        functions: Any = {
            "Sequential": lambda: nn.Sequential(*modules),
            "ModuleList": lambda: nn.ModuleList(modules),
            "list": lambda: modules,
            "tuple": lambda: tuple(modules),
            "deque": lambda: deque(modules),
        }[kind]()
        x = leaf(3, 4)
        if run is plain:
            out = run_all(functions, x)
        else:
            out = checkpoint_sequential(functions, segments, x, use_reentrant=use_reentrant)
        out.square().sum().backward()
        return out, grads([x]), grads(nn.ModuleList(modules))

    assert_exact(program, replays=segments - 1)


def test_a_module_that_occurs_twice_runs_twice() -> None:
    """`nn.Sequential.children()` gives each module once, however often the chain has it."""

    def program(run: Run) -> Any:
        act, model, x = nn.Tanh(), nn.Linear(4, 4), leaf(3, 4)
        chain = nn.Sequential(model, act, model, act, nn.Linear(4, 2), act)
        out = chain(x) if run is plain else checkpoint_sequential(chain, 3, x, use_reentrant=False)
        out.sum().backward()
        return out, grads([x]), grads(chain)

    assert_exact(program, replays=2)


def test_plain_functions() -> None:
    def program(run: Run) -> Any:
        functions: list[Callable[[Tensor], Tensor]] = [torch.sin, lambda t: t * t, torch.exp]
        x = leaf(5)
        if run is plain:
            out = run_all(functions, x)
        else:
            out = checkpoint_sequential(functions, 3, x, use_reentrant=False)
        out.sum().backward()
        return out, grads([x])

    assert_exact(program, replays=2)


@pytest.mark.parametrize(
    ("count", "segments"), [(9, 5), (9, 3), (10, 4), (7, 7), (8, 3), (5, 2), (11, 6)]
)
def test_sizes_differ_by_at_most_one(count: int, segments: int) -> None:
    sizes = Probes(count).chunks(segments)
    assert sum(sizes) == count and len(sizes) == segments
    assert max(sizes) - min(sizes) <= 1, sizes


def test_one_segment_is_a_plain_run() -> None:
    probes = Probes(4)
    x = leaf(3)
    before = ledger.replays()
    out = checkpoint_sequential(probes.functions, 1, x, use_reentrant=False)
    out.sum().backward()
    assert probes.calls == [0, 1, 2, 3] and ledger.replays() == before


@pytest.mark.parametrize("segments", [4, 5, 100])
def test_more_segments_than_functions_means_one_function_each(segments: int) -> None:
    assert Probes(4).chunks(segments) == [1, 1, 1, 1]


def test_one_function() -> None:
    x = leaf(3)
    out = checkpoint_sequential([torch.sin], 3, x, use_reentrant=False)
    out.sum().backward()
    assert torch.equal(x.grad, x.detach().cos())


def test_use_reentrant_none_warns() -> None:
    x = leaf(3)
    with pytest.warns(UserWarning, match="use_reentrant"):
        out = checkpoint_sequential([torch.sin, torch.exp], 2, x)
    out.sum().backward()
    assert torch.equal(x.grad, torch.autograd.grad(x.sin().exp().sum(), x)[0])


@both_forms
def test_preserve_rng_state(use_reentrant: bool) -> None:
    def draw(preserve: bool) -> bool:
        """Whether the replay moved the generator."""
        x = leaf(64)
        functions = [lambda t: torch.dropout(t.sin(), 0.5, True).exp(), torch.tanh]
        out = checkpoint_sequential(
            functions, 2, x, use_reentrant=use_reentrant, preserve_rng_state=preserve
        )
        state = torch.get_rng_state()
        out.sum().backward()
        return not torch.equal(state, torch.get_rng_state())

    assert not draw(True)
    assert draw(False)


def test_without_gradients_nothing_is_recorded() -> None:
    x = leaf(3)
    before = ledger.live_segments()
    with torch.no_grad():
        out = checkpoint_sequential([torch.sin, torch.exp, torch.tanh], 3, x, use_reentrant=False)
        assert ledger.live_segments() == before
    assert torch.equal(out, x.sin().exp().tanh())


# Bad input.


@pytest.mark.parametrize("segments", [0, -1])
def test_segments_below_one(segments: int) -> None:
    with pytest.raises(ValueError, match=f"segments.*{segments}"):
        checkpoint_sequential([torch.sin], segments, leaf(2), use_reentrant=False)


def test_segments_by_index() -> None:
    class Two:
        def __index__(self) -> int:
            return 2

    x = leaf(3)
    before = ledger.segments()
    checkpoint_sequential([torch.sin, torch.exp], Two(), x, use_reentrant=False).sum().backward()  # type: ignore[arg-type]
    assert ledger.segments() == before + 1


@pytest.mark.parametrize("segments", [1.5, "2", None, True], ids=repr)
def test_segments_of_the_wrong_type(segments: Any) -> None:
    kind = type(segments).__name__
    with pytest.raises(TypeError, match=f"segments.*{kind}"):
        checkpoint_sequential([torch.sin, torch.exp], segments, leaf(2), use_reentrant=False)


@pytest.mark.parametrize("functions", [[], (), nn.Sequential()], ids=["list", "tuple", "module"])
def test_no_functions(functions: Any) -> None:
    with pytest.raises(ValueError, match=r"functions.*empty"):
        checkpoint_sequential(functions, 1, leaf(2), use_reentrant=False)


@pytest.mark.parametrize(
    "functions", [3, torch.sin, None, nn.Linear(2, 2), {0: torch.sin}, torch.ones(2)], ids=type
)
def test_functions_of_the_wrong_type(functions: Any) -> None:
    kind = type(functions).__name__
    with pytest.raises(TypeError, match=f"functions.*{kind}"):
        checkpoint_sequential(functions, 1, leaf(2), use_reentrant=False)


def test_an_entry_that_is_not_callable_is_named() -> None:
    with pytest.raises(TypeError, match=r"functions\[1\].*int"):
        checkpoint_sequential([torch.sin, 3], 2, leaf(2), use_reentrant=False)  # type: ignore


def test_unknown_keywords() -> None:
    with pytest.raises((TypeError, ValueError), match="debug"):
        checkpoint_sequential([torch.sin], 1, leaf(2), use_reentrant=False, debug=True)


def test_use_reentrant_of_the_wrong_type() -> None:
    with pytest.raises(TypeError, match=r"use_reentrant must be True.*str"):
        checkpoint_sequential([torch.sin], 1, leaf(2), use_reentrant="no")  # type: ignore


def test_preserve_rng_state_of_the_wrong_type() -> None:
    with pytest.raises(TypeError, match=r"preserve_rng_state must be True.*int"):
        checkpoint_sequential([torch.sin], 1, leaf(2), use_reentrant=False, preserve_rng_state=1)


def test_an_error_in_one_function_leaves_nothing_behind() -> None:
    def broken(x: Tensor) -> Tensor:
        raise KeyError("third")

    functions = [torch.sin, torch.exp, broken, torch.sin]
    x = leaf(3)
    text = message_of(KeyError, lambda: checkpoint_sequential(functions, 4, x, use_reentrant=False))
    assert "third" in text
    assert top_hooks() is None

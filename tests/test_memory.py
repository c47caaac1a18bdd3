"""What a segment keeps alive, and when each thing is freed: by reference counts alone."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo  # torch would import it where debug=True is first used, and keep the frames
from helpers import Run, both_forms, checkpointed, leaf, message_of, plain
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import dropout

from torch_reprise import checkpoint, ledger


@pytest.fixture(autouse=True)
def no_collection() -> Iterator[None]:
    """The garbage collector stays off: only reference counts may free anything here."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Witness:
    """Lives exactly as long as the function that closes over it."""


class Alive:
    """Which of the storages noted so far are still there."""

    def __init__(self) -> None:
        self.refs: list[StorageWeakRef] = []

    def note(self, tensor: Tensor) -> Tensor:
        self.refs.append(StorageWeakRef(tensor.untyped_storage()))
        return tensor

    def count(self) -> int:
        return sum(not ref.expired() for ref in self.refs)


def witnessed() -> tuple[Callable[[Tensor], Tensor], weakref.ref[Witness]]:
    witness = Witness()

    def function(x: Tensor) -> Tensor:
        assert witness is not None
        return dropout(x.sin(), 0.5).exp()

    return function, weakref.ref(witness)


def counters() -> tuple[int, int, int]:
    return ledger.live_segments(), ledger.live_slots(), ledger.stashed_bytes()


OPTIONS: dict[str, dict[str, Any]] = {
    "hooks": {},
    "reentrant": {"use_reentrant": True},
    "no early stop": {"early_stop": False},
    "debug": {"debug": True},
    "no check": {"determinism_check": "none"},
    "context_fn": {"context_fn": lambda: (contextlib.nullcontext(), contextlib.nullcontext())},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


@every_option
def test_a_dropped_graph_frees_its_segments(options: dict[str, Any]) -> None:
    before = counters()
    function, witness = witnessed()
    x = leaf(8)
    out = checkpointed(**options)(function, x)
    del function
    assert witness() is not None and ledger.live_segments() > before[0]
    del out
    assert witness() is None
    assert counters() == before


@every_option
def test_backward_frees_everything_though_the_output_lives(options: dict[str, Any]) -> None:
    before = counters()
    function, witness = witnessed()
    x = leaf(8)
    out = checkpointed(**options)(function, x)
    del function
    out.sum().backward()
    assert out.grad_fn is not None
    assert witness() is None
    assert counters() == before


@every_option
def test_a_retained_graph_is_freed_when_it_is_dropped(options: dict[str, Any]) -> None:
    before = counters()
    function, witness = witnessed()
    x = leaf(8)
    out = checkpointed(**options)(function, x)
    del function
    for _ in range(2):
        out.sum().backward(retain_graph=True)
        assert witness() is not None
    del out
    assert witness() is None
    assert counters() == before


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@both_forms
def test_nested_segments_are_freed(use_reentrant: bool) -> None:
    before = counters()
    call = checkpointed(use_reentrant=use_reentrant)
    function, witness = witnessed()
    x = leaf(8)
    out = call(lambda inner, t: call(inner, call(torch.sin, t.exp())), function, x)
    del function
    out.sum().backward(retain_graph=True)
    del out
    assert witness() is None
    assert counters() == before


@both_forms
def test_a_forward_that_raises_frees_its_segment(use_reentrant: bool) -> None:
    before = counters()

    def broken(x: Tensor) -> Tensor:
        dropout(x.sin(), 0.5).exp()
        raise KeyError("forward")

    message_of(KeyError, lambda: checkpointed(use_reentrant=use_reentrant)(broken, leaf(8)))
    assert counters() == before


@both_forms
def test_a_function_that_refers_to_its_own_output_is_freed(use_reentrant: bool) -> None:
    """Layers keep their last output in an attribute; the segment holds the layer."""

    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sin().exp()

    before = counters()
    layer = Layer()
    witness = weakref.ref(layer)
    x = leaf(4)
    out = checkpointed(use_reentrant=use_reentrant)(layer, x)
    out.sum().backward()
    layer.last = out
    del layer, out
    assert witness() is None
    assert counters() == before


# What the forward keeps.


@both_forms
def test_the_forward_keeps_no_tensor_of_the_segment(use_reentrant: bool) -> None:
    alive = Alive()

    def function(x: Tensor) -> Tensor:
        h = x
        for _ in range(5):
            h = alive.note(torch.tanh(h))
        return h * 2

    x = leaf(16)
    out = checkpointed(use_reentrant=use_reentrant)(function, x)
    assert len(alive.refs) == 5 and alive.count() == 0
    out.sum().backward()
    assert len(alive.refs) > 5 and alive.count() == 0
    alive.refs.clear()
    kept = plain(function, x)
    assert alive.count() == 5, "the plain run keeps them, so the check can see them"
    del kept


def test_the_bytes_that_were_not_saved_are_counted() -> None:
    before, live = ledger.bytes_not_saved(), ledger.live_slots()
    x = leaf(1000)
    out = checkpoint(lambda t: torch.tanh(t).sigmoid(), x, use_reentrant=False)
    assert ledger.live_slots() == live + 2, "tanh and sigmoid each save their result"
    assert ledger.bytes_not_saved() - before == 2 * x.nbytes
    del out
    assert ledger.live_slots() == live
    assert ledger.bytes_not_saved() - before == 2 * x.nbytes, "a total since import"


# What the replay keeps, and how long.


def layer_by_layer(run: Run, retain_graph: bool) -> tuple[list[int], int]:
    """How many of 6 layers' results live each time a gradient gets to the next layer, and after."""
    alive = Alive()
    counts: list[int] = []

    def function(x: Tensor) -> Tensor:
        h = x
        for _ in range(6):
            h = alive.note(torch.tanh(h))
            h.register_hook(lambda grad: counts.append(alive.count()))
        return h.cos()

    x = leaf(16)
    out = run(function, x)
    out.sum().backward(retain_graph=retain_graph)
    return counts, alive.count()


@pytest.mark.parametrize("options", [{}, {"early_stop": False}], ids=["early stop", "complete"])
def test_a_recomputed_tensor_is_freed_as_soon_as_in_a_plain_run(options: dict[str, Any]) -> None:
    expected, _ = layer_by_layer(plain, retain_graph=False)
    assert expected == [6, 5, 4, 3, 2, 1]
    found, left = layer_by_layer(checkpointed(**options), retain_graph=False)
    assert len(found) == 6
    assert all(have <= want for have, want in zip(found, expected, strict=True)), found
    assert left == 0


def test_with_retain_graph_a_recomputed_tensor_is_freed_as_well() -> None:
    plainly, left = layer_by_layer(plain, retain_graph=True)
    assert plainly == [6] * 6 and left == 6
    found, left = layer_by_layer(checkpointed(), retain_graph=True)
    assert all(have <= want for have, want in zip(found, [6, 5, 4, 3, 2, 1], strict=True)), found
    assert left == 0


def test_with_retain_graph_nothing_of_the_replay_outlives_the_backward_call() -> None:
    alive = Alive()

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return alive.note(alive.note(x.tanh()).sigmoid()) * 2, alive.note(x.exp()).cos()

    x = leaf(16)
    first, second = checkpoint(function, x, use_reentrant=False)
    alive.refs.clear()
    torch.autograd.backward([first.sum(), second.sum()], retain_graph=True)
    assert len(alive.refs) == 3 and alive.count() == 0
    del first, second


def test_the_inputs_of_a_segment_are_freed_with_it() -> None:
    alive = Alive()
    x = leaf(16)
    hidden, keyword, nested = (alive.note(x.exp()) for _ in range(3))
    out = checkpoint(
        lambda a, *, b, c: torch.sin(a * b) * c["d"][0],
        hidden,
        b=keyword,
        c={"d": [nested]},
        use_reentrant=False,
    )
    assert alive.count() == 3
    del hidden, keyword, nested
    assert alive.count() == 3
    out.sum().backward()
    assert alive.count() == 0


def test_a_failed_replay_keeps_nothing() -> None:
    alive = Alive()
    calls: list[int] = []

    def function(x: Tensor) -> Tensor:
        calls.append(1)
        h = alive.note(alive.note(x.tanh()).sigmoid())
        if len(calls) > 1:
            raise KeyError("replay")
        return h.exp()

    before = counters()
    x = leaf(16)
    out = checkpoint(function, x, use_reentrant=False)
    message_of(KeyError, out.sum().backward)
    assert len(alive.refs) == 4 and alive.count() == 0
    del out
    assert counters() == before


# In-place changes between the forward and the backward.


@pytest.mark.parametrize("place", ["positional", "keyword", "list", "dict"])
@both_forms
def test_an_argument_changed_in_place_is_noticed(place: str, use_reentrant: bool) -> None:
    x = leaf(8)
    hidden = x.exp()
    call = checkpointed(use_reentrant=use_reentrant)
    if place == "positional":
        out = call(lambda t: t.sin(), hidden)
    elif place == "keyword":
        out = call(lambda *, t: t.sin(), t=hidden)
    elif place == "list":
        out = call(lambda ts: ts[1][0].sin(), [1, (hidden,)])
    else:
        out = call(lambda ts: ts["t"].sin(), {"t": hidden})
    with torch.no_grad():
        hidden.add_(1)
    text = message_of(RuntimeError, lambda: out.sum().backward())
    assert "modified by an inplace operation" in text
    assert x.grad is None


def test_a_parameter_changed_before_backward_is_noticed_when_it_is_an_argument() -> None:
    w = nn.Parameter(torch.randn(4, 4))
    x = leaf(2, 4)
    out = checkpoint(lambda a, b: torch.tanh(a @ b), x, w, use_reentrant=False)
    with torch.no_grad():
        w.mul_(0.9)
    text = message_of(RuntimeError, lambda: out.sum().backward())
    assert "modified by an inplace operation" in text


def test_a_context_that_keeps_the_exception_of_a_replay_does_not_keep_its_tensors() -> None:
    kept: list[BaseException] = []

    class Keeps:
        def __enter__(self) -> None: ...

        def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
            if error is not None:
                kept.append(error)

    def inside(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with Keeps():
            return function(x)

    function, witness = witnessed()
    checkpointed()(partial(inside, function), leaf(8)).sum().backward()
    assert [type(error).__name__ for error in kept] == ["EarlyStop"]
    assert kept[0].__traceback__ is None
    del function
    assert witness() is None


def test_an_exception_of_the_function_keeps_its_traceback() -> None:
    kept: list[Exception] = []

    def goes_on(x: Tensor) -> Tensor:
        try:
            return x.sin().exp()
        except BaseException:  # swallows the stop, and fails in its place
            kept.append(ValueError("mine"))
            raise kept[0] from None

    checkpointed()(goes_on, leaf(8)).sum().backward()
    assert len(kept) == 1 and kept[0].__traceback__ is not None


# --- what a segment keeps of the steps before it


class Recurrent:
    """Keeps its last output where its forward finds it again, with the history that it has."""

    def __init__(self) -> None:
        self.weight = torch.randn(4, 4, requires_grad=True)
        self.last = torch.zeros(4, 4)


def through_a_closure(state: Recurrent, steps: int) -> Iterator[Tensor]:
    last = state.last
    for _ in range(steps):

        def fn(x: Tensor) -> tuple[Tensor, Tensor]:
            z = x @ state.weight + last.detach()  # noqa: B023
            return z.sin(), z.tanh()

        out, last = checkpoint(fn, torch.randn(4, 4, requires_grad=True), use_reentrant=False)
        out.sum().backward()
        yield last
    last = state.last  # or the function and its own output keep each other


def through_an_argument(state: Recurrent, steps: int) -> Iterator[Tensor]:
    def fn(x: Tensor, state: Recurrent) -> Tensor:
        z = x @ state.weight + state.last.detach()
        state.last = z.tanh()
        return z.sin()

    for _ in range(steps):
        x = torch.randn(4, 4, requires_grad=True)
        checkpoint(fn, x, state, use_reentrant=False).sum().backward()
        yield state.last
    state.last = torch.zeros(4, 4)


def through_a_buffer(state: Recurrent, steps: int) -> Iterator[Tensor]:
    class Module(nn.Module):
        last: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("last", state.last)

        def forward(self, x: Tensor) -> Tensor:
            z = x @ state.weight + self.last.detach()
            self.last = z.tanh()
            return z.sin()

    module = Module()
    for _ in range(steps):
        x = torch.randn(4, 4, requires_grad=True)
        checkpoint(module, x, use_reentrant=False).sum().backward()
        yield module.last
    module.last = state.last


@pytest.mark.parametrize("play", [through_a_closure, through_an_argument, through_a_buffer])
def test_a_recurrence_by_name_does_not_keep_all_steps(
    play: Callable[[Recurrent, int], Iterator[Tensor]],
) -> None:
    seen = [weakref.ref(last) for last in play(Recurrent(), 20)]
    assert sum(last() is not None for last in seen) <= 1


def test_what_a_name_stood_for_is_there_without_its_history() -> None:
    """The tensor itself is gone when backward runs; its values are needed, and its place."""
    weight = torch.linspace(0.1, 0.4, 4, requires_grad=True)  # exp of more may overflow

    def steps(run: Callable[..., Tensor]) -> Tensor | None:
        torch.manual_seed(0)
        weight.grad = None
        h = torch.rand(4, requires_grad=True)
        y = torch.zeros(())
        for _ in range(4):
            skip = h * weight
            h = run(lambda t: (t * skip).sin() * skip.exp(), h)  # noqa: B023
            y = y + h.sum()
        y.backward()
        return weight.grad

    expected = steps(lambda fn, *args: fn(*args))
    found = steps(lambda fn, *args: checkpoint(fn, *args, use_reentrant=False))
    assert expected is not None and found is not None and torch.equal(found, expected)

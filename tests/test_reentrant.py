"""use_reentrant=True: torch's documented behaviour, and what a node with known edges adds to it."""

from __future__ import annotations

import dataclasses
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from helpers import (
    Changing,
    Counted,
    Run,
    assert_exact,
    checkpointed,
    grads,
    leaf,
    message_of,
    plain,
)
from torch import Tensor, nn
from torch.nn.functional import dropout

from torch_reprise import (
    CheckpointError,
    CheckpointFunction,
    check_backward_validity,
    checkpoint,
    detach_variable,
    ledger,
    set_checkpoint_early_stop,
)


def mixed(x: Tensor, w: Tensor) -> Tensor:
    return dropout(torch.tanh(x @ w), 0.4).exp() * w


def exact(program: Any, replays: int | None = 1) -> None:
    assert_exact(program, replays=replays, use_reentrant=True)


# What torch documents.


def test_the_forward_runs_without_gradients_and_the_replay_with() -> None:
    function = Counted(torch.sin)
    x = leaf(3)
    out = checkpoint(function, x, use_reentrant=True)
    assert out.requires_grad and not out.is_leaf
    out.sum().backward()
    assert function.grad_modes == [False, True]


def test_the_replay_runs_the_whole_function() -> None:
    log: list[str] = []

    def function(x: Tensor) -> Tensor:
        out = x.exp()
        log.append("exp")
        out = out + 1
        log.append("add")
        return out

    x = leaf(3)
    with set_checkpoint_early_stop(True):
        checkpoint(function, x, use_reentrant=True, early_stop=True).sum().backward()
    assert log == ["exp", "add"] * 2


def test_no_input_requires_grad() -> None:
    linear, x = nn.Linear(3, 3), torch.randn(2, 3)
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        out = checkpoint(linear, x, use_reentrant=True)
    assert not out.requires_grad
    assert torch.equal(out, linear(x))


def test_parameters_get_their_gradients_from_the_nested_backward() -> None:
    def program(run: Run) -> Any:
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 4))
        x = leaf(3, 4)
        out = run(model, x.sin())
        out.sum().backward()
        return out, grads([x]), grads(model)

    exact(program)


def test_an_argument_that_does_not_require_grad_gets_none() -> None:
    def program(run: Run) -> Any:
        x, constant = leaf(4, 4), torch.randn(4, 4)
        out = run(mixed, x, constant)
        out.sum().backward()
        return out, grads([x, constant])

    exact(program)


def test_outputs_that_are_integers_or_no_tensors() -> None:
    def function(x: Tensor) -> Any:
        values, index = x.sin().sort()
        return values.exp(), index, x.shape[0], "name", None

    def program(run: Run) -> Any:
        x = leaf(5)
        out = run(function, x)
        assert not out[1].requires_grad
        out[0].sum().backward()
        return list(out), grads([x])

    exact(program)


def test_outputs_that_are_inputs() -> None:
    def program(run: Run) -> Any:
        x, y = leaf(3), leaf(3)
        same, product = run(lambda a, b: (a, torch.sin(a * b)), x.exp(), y)
        (same * product).sum().backward()
        return same, product, grads([x, y])

    exact(program)


VIEWS: dict[str, Callable[[Tensor], Any]] = {
    "view": lambda x: x.view(-1),
    "row": lambda x: x[0],
    "transposed": lambda x: x.t(),
    "unbound": lambda x: list(x.unbind()),
    "with another": lambda x: (x.t(), x.sin()),
    "of another": lambda x: x.sin().view(-1)[1:],
    "itself too": lambda x: (x, x.view(-1)),
}


@pytest.mark.parametrize("of", ["argument", "parameter"])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_outputs_that_are_views(view: Callable[[Tensor], Any], of: str) -> None:
    def program(run: Run) -> Any:
        x, w = leaf(3, 4), nn.Parameter(torch.rand(3, 4))
        if of == "argument":
            out = run(view, x.cos())
        else:
            out = run(lambda x: view(w), x.cos())
        outs = [out] if isinstance(out, Tensor) else out
        sum(y.exp().sum() for y in outs).backward()
        return out, grads([x]), w.grad if of == "parameter" else 0

    exact(program)


def test_a_list_that_is_returned_is_the_functions_own() -> None:
    def program(run: Run) -> Any:
        made: list[Any] = []

        def fn(x: Tensor) -> Any:
            made.append([x.sin(), {"a": x.cos()}])
            return made[-1]

        x = leaf(3)
        out = run(fn, x)
        assert out is made[0] and out[1] is made[0][1]
        (out[0] * out[1]["a"]).sum().backward()
        return out, grads([x])

    exact(program)


def test_outputs_that_were_there_before() -> None:
    """They are what they are in the plain program: themselves, with the history that they have."""

    def program(run: Run) -> Any:
        x, weight, constant = leaf(3), nn.Parameter(torch.rand(3)), torch.rand(3)
        norm, closed_over = nn.BatchNorm1d(3), leaf(3) + 1  # whose history saves nothing
        module = nn.Module()
        module.forward = lambda x: (norm(x[None].repeat(2, 1)), norm.weight)  # type: ignore[method-assign]
        outs = [
            run(lambda x: ((x * constant).tanh(), constant), x),
            run(lambda x: ((x * weight).tanh(), weight), x),
            run(lambda x: ((x * closed_over).tanh(), closed_over), x),
            run(module, x),
        ]
        assert [outs[0][1] is constant, outs[1][1] is weight, outs[2][1] is closed_over] == [
            True
        ] * 3
        sum((y * z).sum() for y, z in outs).backward()
        return outs, constant, grads([x, weight, *norm.parameters()])

    exact(program, replays=4)


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    first: Any
    rest: Any = None


class Output(OrderedDict[str, Any]):
    """A mapping whose items are attributes too."""

    def __init__(self, first: Any, rest: Any = None) -> None:
        super().__init__()
        self["first"], self["rest"] = first, rest

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        super().__setattr__(name, value)


@pytest.mark.parametrize(
    "kind", [Frozen, dataclasses.make_dataclass("Open", ["first", "rest"]), Output]
)
def test_outputs_in_dataclasses_and_mappings_of_the_users(kind: Any) -> None:
    def program(run: Run) -> Any:
        x, y = leaf(3), leaf(3)
        state = [x.sin()]

        def fn(x: Tensor, y: Tensor) -> Any:
            return kind((x * y).exp(), [kind(x.cos(), 3), (y, state[0])])

        out = run(fn, x, y)
        inner, (same, before) = out.rest
        assert same is y and before is state[0]
        ((out.first * inner.first * same).sum() + before.sum()).backward()
        return out.first, inner.first, inner.rest, same, before, grads([x, y])

    exact(program)


@dataclasses.dataclass
class State:
    x: Any = None
    made: Any = None


class Stats:
    """Has a field that nobody can set."""

    __dataclass_fields__: ClassVar[dict[str, object]] = {"mean": None, "value": None}

    def __init__(self, value: Tensor) -> None:
        self.value = value

    @property
    def mean(self) -> float:
        return float(self.value.detach().mean())


def test_a_state_that_is_an_argument_and_is_returned() -> None:
    def program(run: Run) -> Any:
        x = leaf(3)
        state = State(x)

        def fn(x: Tensor, state: State) -> Any:
            h = x * 2
            state.made = h.detach() * 2
            return h.sin(), state, [state.x]

        out, found, (same,) = run(fn, x, state)
        assert found is state and state.x is x and same is x
        out.sum().backward()
        return out, state.made, grads([x])

    exact(program)


def test_containers_that_are_there_before_are_not_written_into() -> None:
    def program(run: Run) -> Any:
        x, outs = leaf(3), []
        held = [x, {"x": x}]
        cache = Output(x)
        for _ in range(2):
            y, found, again = run(lambda x: (x.sin(), held, cache), x)
            assert found is held and again is cache
            assert held[0] is x and held[1]["x"] is x and cache["first"] is x
            outs.append(y)
        sum(y.sum() for y in outs).backward()
        return outs, grads([x])

    exact(program, replays=2)


def test_a_field_that_cannot_be_set() -> None:
    def program(run: Run) -> Any:
        x = leaf(3)
        out = run(lambda x: Stats(x.exp()), x)
        out.value.sum().backward()
        return out.value, out.mean, grads([x])

    exact(program)


def test_an_argument_that_is_returned_is_itself() -> None:
    def program(run: Run) -> Any:
        x, mask = leaf(3), torch.ones(3)
        h = x.exp()
        same, masked, mask_too = run(lambda h, mask: (h, h * mask, mask), h, mask)
        assert same is h and mask_too is mask
        (same * masked).sum().backward()
        return masked, mask_too, grads([x])

    exact(program)


def test_an_output_that_was_there_before_and_is_not_found_is_an_error() -> None:
    hidden = [[torch.rand(3)]]  # two levels deep

    def fn(x: Tensor) -> Any:
        return (x * hidden[0][0]).tanh(), hidden[0][0]

    out, _ = checkpointed(use_reentrant=True)(fn, leaf(3))
    text = message_of(CheckpointError, lambda: out.sum().backward())
    assert "fn returns, as output 1, a tensor that was there before" in text
    assert "return a copy of it" in text
    hidden.clear()  # which has the segment behind it


def test_one_of_several_outputs_is_used() -> None:
    def program(run: Run) -> Any:
        x, w = leaf(4, 4), leaf(4, 4)
        _, used, _ = run(lambda a, b: ((a @ b).sin(), (a * b).exp(), a.detach()), x, w)
        used.sum().backward()
        return used, grads([x, w])

    exact(program)


def test_views_and_in_place_changes_of_an_output() -> None:
    def program(run: Run) -> Any:
        x, w = leaf(4, 4), leaf(4, 4)
        out = run(mixed, x, w)
        out.mul_(2.0)
        out[0].add_(w[0])
        out.sin().sum().backward()
        return out, grads([x, w])

    exact(program)


def test_no_output_requires_grad() -> None:
    x = leaf(3)
    out = checkpoint(lambda t: t.detach() * 2, x, use_reentrant=True)
    assert "requires_grad" in message_of(RuntimeError, lambda: out.sum().backward())


def test_an_in_place_change_of_an_argument_is_noticed() -> None:
    x = leaf(3)
    h = x.exp()
    out = checkpoint(torch.sin, h, use_reentrant=True)
    h.add_(1)
    text = message_of(RuntimeError, lambda: out.sum().backward())
    assert "modified by an inplace operation" in text


def test_checkpoint_function_apply() -> None:
    def program(run: Run) -> Any:
        x, w = leaf(4, 4), leaf(4, 4)
        out = mixed(x, w) if run is plain else CheckpointFunction.apply(mixed, True, x, w)
        out.sum().backward()
        return out, grads([x, w])

    exact(program)


def test_detach_variable() -> None:
    x, y = leaf(3), torch.ones(3)
    detached = detach_variable((x, 3, y, "s"))
    assert isinstance(detached, tuple) and detached[1] == 3 and detached[3] == "s"
    assert detached[0].is_leaf and detached[0].requires_grad and detached[0] is not x
    assert detached[0].data_ptr() == x.data_ptr() and not detached[2].requires_grad
    with pytest.raises(RuntimeError, match="tuple"):
        detach_variable([x])  # type: ignore[arg-type]


def test_check_backward_validity() -> None:
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        check_backward_validity([torch.ones(1), 3, None])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_backward_validity([torch.ones(1), leaf(1)])


# What torch refuses.


def test_keyword_arguments() -> None:
    def function(x: Tensor, *, weight: Tensor, power: int, bias: Any = None) -> Tensor:
        out = torch.tanh(x @ weight) ** power
        return out if bias is None else dropout(out + bias, 0.5)

    def program(run: Run) -> Any:
        x, w, b = leaf(3, 4), leaf(4, 4), leaf(4)
        h = run(function, x, weight=w, power=2)
        out = run(function, weight=w.sin(), x=h, power=3, bias=b)
        out.sum().backward()
        return h, out, grads([x, w, b])

    exact(program, replays=2)


def test_only_keyword_and_nested_arguments_require_grad() -> None:
    def function(x: Tensor, pack: Any, *, last: Tensor) -> dict[str, Any]:
        h = torch.sin(x * pack["a"][0]) + pack["b"]
        return {"h": h.exp(), "list": [h.tanh() * last, 3]}

    def program(run: Run) -> Any:
        a, b, c = leaf(4), leaf(4), leaf(4)
        out = run(function, torch.ones(4), {"a": [a], "b": b}, last=c)
        (out["h"] * out["list"][0]).sum().backward()
        return out, grads([a, b, c])

    exact(program)


@pytest.mark.parametrize("which", ["arguments", "first", "second"])
def test_autograd_grad_with_respect_to_arguments(which: str) -> None:
    def program(run: Run) -> Any:
        x, w = leaf(4, 4), leaf(4, 4)
        wanted = {"arguments": [x, w], "first": [x], "second": [w]}[which]
        out = run(mixed, x, w)
        found = torch.autograd.grad(out.sum(), wanted)
        return out, list(found), grads([x, w])

    exact(program)


def test_backward_with_inputs() -> None:
    def program(run: Run) -> Any:
        x, w = leaf(4, 4), leaf(4, 4)
        out = run(mixed, x.sin(), w)
        out.sum().backward(inputs=[x])
        return out, grads([x, w])

    exact(program)


@pytest.mark.parametrize("how", ["inputs", "grad", "unused", "materialized"])
@pytest.mark.parametrize("held", ["leaf", "not a leaf"])
def test_asked_for_what_the_function_holds(held: str, how: str) -> None:
    x, w = leaf(3), leaf(3)
    h = w if held == "leaf" else w + 1
    out = checkpoint(lambda x: (x * h).tanh(), x, use_reentrant=True).sum()
    options: dict[str, Any] = {
        "unused": {"allow_unused": True},
        "materialized": {"materialize_grads": True},
    }.get(how, {})

    def ask() -> object:
        return (
            out.backward(inputs=[x, h])
            if how == "inputs"
            else torch.autograd.grad(out, [x, h], **options)
        )

    assert "asks for the gradient of a tensor" in message_of(CheckpointError, ask)


def test_autograd_grad_for_what_an_argument_and_a_held_tensor_come_from() -> None:
    """The way through the held one is none of the graph's."""
    x = leaf(3)
    h = x.exp()
    out = checkpoint(lambda a: (a * h).tanh(), x, use_reentrant=True).sum()
    assert "use_reentrant=False" in message_of(CheckpointError, lambda: torch.autograd.grad(out, x))


def test_autograd_grad_does_not_accumulate_into_closed_over_parameters() -> None:
    """Silently wrong is the one thing that it must not be: exact, or refused."""

    def attempt(run: Run, linear: nn.Module, x: Tensor) -> Tensor:
        return torch.autograd.grad(run(lambda t: torch.tanh(linear(t)), x).sum(), x)[0]

    linear, x = nn.Linear(3, 3), leaf(2, 3)
    expected = attempt(plain, linear, x)
    try:
        found = attempt(checkpointed(use_reentrant=True), linear, x)
    except RuntimeError as error:
        assert "use_reentrant=False" in str(error), "a refusal says what to do"
    else:
        assert torch.equal(found, expected)
    assert grads(linear) == [None, None] and x.grad is None


def test_autograd_grad_for_a_closed_over_parameter_is_never_silently_wrong() -> None:
    linear, x = nn.Linear(3, 3), leaf(2, 3)
    (expected,) = torch.autograd.grad(torch.tanh(linear(x)).sum(), linear.weight)

    def attempt() -> Tensor:
        out = checkpoint(lambda t: torch.tanh(linear(t)), x, use_reentrant=True)
        return torch.autograd.grad(out.sum(), linear.weight)[0]

    try:
        found = attempt()
    except RuntimeError as error:
        text = str(error)
        assert "use_reentrant=False" in text or "not have been used in the graph" in text
    else:
        assert torch.equal(found, expected)
    assert grads(linear) == [None, None] and x.grad is None


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.needs_gc  # a gradient with a graph refers to its own leaf
@pytest.mark.parametrize("how", ["grad", "backward"])
def test_create_graph_is_exact_or_refused(how: str) -> None:
    """The first derivative has a graph outside the segment too: what the segment adds to the second
    one can go missing without a word."""

    def second_order(run: Run, x: Tensor) -> Tensor:
        out = (x * run(lambda t: torch.sin(t) * t, x)).sum()
        if how == "grad":
            (slope,) = torch.autograd.grad(out, x, create_graph=True)
        else:
            out.backward(create_graph=True)
            slope, x.grad = x.grad, None
        return torch.autograd.grad(slope.square().sum(), x)[0]

    x = leaf(4)
    expected = second_order(plain, x)
    try:
        found = second_order(checkpointed(use_reentrant=True), x)
    except RuntimeError as error:
        assert "use_reentrant=False" in str(error), "a refusal says what to do"
    else:
        assert torch.equal(found, expected)
    x.grad = None


# Errors.


def test_an_error_in_the_replay_leaves_nothing_behind() -> None:
    def broken(x: Tensor) -> Tensor:
        torch.rand(3)
        raise KeyError("the second time")

    x = leaf(3)
    out = checkpoint(Changing(lambda t: dropout(t.sin(), 0.5), broken), x, use_reentrant=True)
    state = torch.get_rng_state()
    assert "the second time" in message_of(KeyError, out.sum().backward)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled() and x.grad is None
    del out
    assert ledger.live_segments() == 0 and ledger.stashed_bytes() == 0


@pytest.mark.parametrize(
    ("later", "words"),
    [
        (lambda t: (t.sin(), t.cos()), "returned 2 output tensors where its forward returned 1"),
        (lambda t: t.sin()[:2], "shape|size"),
    ],
    ids=["more outputs", "another shape"],
)
def test_a_replay_that_returns_something_else_is_an_error(later: Any, words: str) -> None:
    x = leaf(4)
    out = checkpoint(Changing(torch.sin, later), x, use_reentrant=True)
    with pytest.raises(RuntimeError, match=f"(?i){words}"):
        out.sum().backward()
    assert x.grad is None

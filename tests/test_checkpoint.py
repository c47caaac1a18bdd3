"""checkpoint() without reentrant autograd: the ways to call it, and what goes in and comes out."""

from __future__ import annotations

import abc
import contextvars
import copy
import functools
import inspect
import pickle
import weakref
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import ANY, Mock

import pytest
import torch
from helpers import (
    Counted,
    Run,
    assert_exact,
    both_forms,
    checkpointed,
    grads,
    in_threads,
    leaf,
    plain,
)
from torch import Tensor, nn
from torch.utils import checkpoint as upstream

import torch_reprise
from torch_reprise import (
    Checkpointer,
    CheckpointError,
    checkpoint,
    is_recomputing,
    ledger,
    set_checkpoint_debug_enabled,
    set_checkpoint_early_stop,
)

Pair = namedtuple("Pair", ["left", "right"])


def block(width: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, width))


# The ways to call it.


@both_forms
def test_a_module_is_exact(use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        model, x = block(), leaf(4, 6)
        out = run(model, x)
        out.square().sum().backward()
        return out, grads([x]), grads(model)

    assert_exact(program, replays=1, use_reentrant=use_reentrant)


@both_forms
def test_a_training_loop_is_exact(use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        model = nn.Sequential(block(), nn.BatchNorm1d(6), block())
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        losses = []
        for _ in range(4):
            x = leaf(5, 6)
            loss = run(model[2], model[1](run(model[0], x))).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses, list(model.parameters()), list(model.buffers())

    assert_exact(program, replays=8, use_reentrant=use_reentrant)


def test_signature_is_torchs_with_the_additions() -> None:
    ours = inspect.signature(checkpoint).parameters
    theirs = inspect.signature(upstream.checkpoint).parameters
    assert next(iter(ours)) == next(iter(theirs)) == "function"
    named = [p for p in theirs.values() if p.kind is p.KEYWORD_ONLY]
    assert {"use_reentrant", "context_fn", "early_stop"} <= {p.name for p in named}
    for parameter in named:
        if parameter.name == "context_fn":
            assert ours["context_fn"].default is torch_reprise.noop_context_fn
        else:
            assert ours[parameter.name].default == parameter.default
    for name, default in (("preserve_rng_state", True), ("respect_saved_tensors_hooks", None)):
        assert ours[name].default is default
    assert checkpoint.__name__ == "checkpoint" and checkpoint.__doc__


def test_every_public_name_of_torchs_module_is_here() -> None:
    assert set(upstream.__all__) <= set(torch_reprise.__all__)
    assert all(hasattr(torch_reprise, name) for name in torch_reprise.__all__)
    for name in ("CheckpointPolicy", "SAC_IGNORED_OPS", "create_selective_checkpoint_contexts"):
        assert getattr(torch_reprise, name) is getattr(upstream, name)


@both_forms
def test_the_curried_form_equals_the_direct_one(use_reentrant: bool) -> None:
    curried = checkpoint(use_reentrant=use_reentrant)
    assert_exact(lambda run: two_matmuls(curried_or(run, curried)), use_reentrant=use_reentrant)


def curried_or(run: Run, curried: Any) -> Run:
    if run is plain:
        return plain
    return lambda function, *args, **kwargs: curried(function)(*args, **kwargs)


def two_matmuls(run: Run) -> Any:
    x, w = leaf(3, 3), leaf(3, 3)
    out = run(lambda a, b: torch.sin(a @ b) @ b, x, w)
    out.sum().backward()
    return out, grads([x, w])


def test_the_decorator_keeps_the_functions_name_and_doc() -> None:
    @checkpoint(use_reentrant=False)
    def squares(x: Tensor, *, power: int = 2) -> Tensor:
        """Raises to a power."""
        return x.sin() ** power

    assert squares.__name__ == "squares"
    assert squares.__doc__ == "Raises to a power."
    x = leaf(5)
    before = ledger.replays()
    squares(x, power=3).sum().backward()
    assert ledger.replays() == before + 1
    (expected,) = torch.autograd.grad((x.sin() ** 3).sum(), x)
    assert torch.equal(x.grad, expected)


@checkpoint(use_reentrant=False)
def of_this_module(x: Tensor) -> Tensor:
    return x.sin().exp()


def test_a_decorated_function_is_pickled_by_its_name() -> None:
    assert pickle.loads(pickle.dumps(of_this_module)) is of_this_module


class Named(Checkpointer):
    name = ""


def test_a_checkpointer_is_pickled_and_copied_with_its_options_and_attributes() -> None:
    made = Named(ambient="check", early_stop=False, determinism_check="none")
    made.name = "encoder"
    for other in (pickle.loads(pickle.dumps(made)), copy.copy(made), copy.deepcopy(made)):
        assert (type(other), repr(other), other.name) == (Named, repr(made), "encoder")
        calls = Counted(lambda x: x.sin().exp())
        other(calls, leaf(3)).sum().backward()
        assert calls.calls == 2


def test_settings_hold_for_a_checkpointer_that_was_made_before() -> None:
    ended = []

    def function(x: Tensor) -> Tensor:
        out = x.sin().exp()
        ended.append(out)
        return out + 1

    calls = {True: Checkpointer(), False: Checkpointer(early_stop=False)}
    for early_stop in (True, False):
        for made_with in (True, False):
            ended.clear()
            with set_checkpoint_early_stop(early_stop):
                calls[made_with](function, leaf(3)).sum().backward()
            assert len(ended) == (1 if early_stop else 2)
    with set_checkpoint_debug_enabled(True):
        out = calls[True](lambda x: x.neg() if is_recomputing() else x.sin(), leaf(3))
        with pytest.raises(CheckpointError, match="sin"):
            out.sum().backward()


def test_a_decorated_function_has_the_attributes_of_its_function() -> None:
    def function(x: Tensor) -> Tensor:
        return x.sin()

    function.tag = "block"  # type: ignore[attr-defined]
    decorated: Any = checkpoint(use_reentrant=False)(function)
    assert decorated.tag == "block"
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        decorated.other  # noqa: B018

    class Abstract(abc.ABC):
        @checkpoint(use_reentrant=False)
        @abc.abstractmethod
        def run(self, x: Tensor) -> Tensor: ...

    with pytest.raises(TypeError, match="abstract"):
        Abstract()  # type: ignore[abstract]


def test_decorated_methods_are_equal_where_methods_are() -> None:
    class Model:
        @checkpoint(use_reentrant=False)
        def run(self, x: Tensor) -> Tensor:
            return x.sin()

        def other(self) -> None: ...

    one, two = Model(), Model()
    assert one.run == one.run and {one.run: 1}[one.run] == 1
    assert one.run != two.run and one.run != one.other and one.run != 3
    decorate = checkpoint(use_reentrant=False)
    assert decorate(one.other) == decorate(one.other)
    assert decorate(one.other) != checkpoint(use_reentrant=False)(one.other)
    assert decorate(torch.sin) != decorate(torch.sin)
    assert decorate(torch.sin) == ANY
    assert copy.deepcopy(decorate(one.other)) != decorate(one.other)


def test_a_result_that_says_it_is_a_tensor() -> None:
    for result in (Mock(spec=torch.Tensor), weakref.proxy(torch.ones(2)), None, 3):
        found = checkpoint(lambda x, r=result: r, leaf(3), use_reentrant=False)
        assert found is result


class WithOwn(nn.Module):
    """Keeps checkpointed callables of its own among its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.curried = checkpoint(use_reentrant=False)(self.plain)
        self.wrapped = checkpoint(use_reentrant=False)(self.linear)
        self.decorated = self.method

    def plain(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()  # type: ignore[no-any-return]

    @checkpoint(use_reentrant=False)
    def method(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()  # type: ignore[no-any-return]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("attribute", ["curried", "wrapped", "decorated"])
def test_a_copy_of_a_module_runs_its_own_parameters(attribute: str, copied: Any) -> None:
    module = WithOwn()
    other = copied(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    result = getattr(other, attribute)(torch.ones(2, 3))
    assert torch.equal(result, torch.zeros(2, 3))
    result.sum().backward()
    assert [p.grad for p in module.parameters()] == [None, None]
    assert all(p.grad is not None for p in other.parameters())


@pytest.mark.parametrize("threads", [1, 2])
def test_settings_are_decorators_too(threads: int) -> None:
    calls: list[bool] = []

    def fn(x: Tensor) -> Tensor:
        y = x.sin().exp()
        calls.append(torch_reprise.is_recomputing())
        return y + 1

    @torch_reprise.set_checkpoint_early_stop(False)
    @torch_reprise.set_checkpoint_debug_enabled(None)
    def step() -> None:
        checkpoint(fn, leaf(3), use_reentrant=False).sum().backward()

    def work(_: int) -> None:
        step()

    in_threads(threads, work)
    assert sorted(calls) == [False] * threads + [True] * threads, "no early stop in it"
    calls.clear()
    setting = torch_reprise.set_checkpoint_early_stop(False)
    with setting, setting:
        pass
    checkpoint(fn, leaf(3), use_reentrant=False).sum().backward()
    assert calls == [False]


def test_settings_leave_nothing_in_the_context() -> None:
    def variables_after(blocks: int) -> int:
        for _ in range(blocks):
            with torch_reprise.set_checkpoint_early_stop(False):
                pass
        return len(contextvars.copy_context())

    assert variables_after(1) == variables_after(20)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_options_are_found_however_their_names_were_made(use_reentrant: bool) -> None:
    """Names that the program writes are one object each; these are others of the same letters."""

    def made(name: str) -> str:
        return "".join(list(name))

    def call(**options: Any) -> Tensor:
        x, y = leaf(3), torch.ones(3)
        fn = Counted(lambda x, *, scale, y: (x * y).sin() * scale)
        given = {made(name): value for name, value in {**options, "scale": 2, "y": y}.items()}
        out: Tensor = checkpoint(fn, x, **given)
        assert given.keys() == {*options, "scale", "y"}
        out.sum().backward()
        assert fn.calls == 2
        assert torch.equal(x.grad, torch.autograd.grad((x * y).sin().sum() * 2, x)[0])
        return out

    for options in (
        {},
        {"early_stop": False},
        {"preserve_rng_state": False, "determinism_check": made("none")},
        {"debug": False, "respect_saved_tensors_hooks": None, "determinism_check": "default"},
        {"context_fn": torch_reprise.noop_context_fn},
    ):
        call(use_reentrant=use_reentrant, **options)
    for name, value, error in (
        ("early_stop", 1, TypeError),
        ("preserve_rng_state", None, TypeError),
        ("debug", "no", TypeError),
        ("determinism_check", "some", ValueError),
        ("context_fn", None, TypeError),
        ("respect_saved_tensors_hooks", 0, TypeError),
        ("use_reentrant", 0, TypeError),
    ):
        with pytest.raises(error, match=name):
            call(**{"use_reentrant": use_reentrant, name: value})


def test_the_decorator_works_on_methods() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        @checkpoint(use_reentrant=False)
        def forward(self, x: Tensor, *, scale: float) -> Tensor:
            return torch.sigmoid(self.linear(x)) * scale

    model, x = Model(), leaf(2, 3)
    before = ledger.replays()
    model(x, scale=0.5).sum().backward()
    assert ledger.replays() == before + 1
    found = grads(model)
    model.zero_grad()
    (torch.sigmoid(model.linear(x)) * 0.5).sum().backward()
    for have, want in zip(found, grads(model), strict=True):
        assert torch.equal(have, want)


def test_a_checkpointer_gives_every_keyword_to_the_function() -> None:
    def function(x: Tensor, *, debug: Tensor, context_fn: int, early_stop: str) -> Tensor:
        assert (context_fn, early_stop) == (3, "yes")
        return torch.sin(x * debug)

    def program(run: Run) -> Any:
        call = plain if run is plain else Checkpointer()
        x, d = leaf(4), leaf(4)
        out = call(function, x, debug=d, context_fn=3, early_stop="yes")
        out.sum().backward()
        return out, grads([x, d])

    assert_exact(program, replays=1)


def test_use_reentrant_none_warns_and_means_true() -> None:
    function = Counted(torch.sin)
    x = leaf(3)
    with pytest.warns(UserWarning, match="use_reentrant"):
        out = checkpoint(function, x)
    assert function.grad_modes == [False], "the reentrant form runs the forward without gradients"
    out.sum().backward()
    assert function.grad_modes == [False, True]
    assert torch.equal(x.grad, x.detach().cos())


def method_of(x: Tensor) -> Any:
    class Owner:
        def scale(self, t: Tensor) -> Tensor:
            return (t.sin() * 2).exp()

    return Owner().scale


@pytest.mark.parametrize(
    "make",
    [
        method_of,
        lambda x: functools.partial(torch.addcmul, value=0.5, tensor2=x.detach().cos(), tensor1=x),
        lambda x: torch.nn.GELU(),
        lambda x: torch.exp,
        lambda x: Counted(torch.tanh),
    ],
    ids=["bound method", "partial", "module", "builtin", "callable object"],
)
def test_every_kind_of_callable(make: Any) -> None:
    def program(run: Run) -> Any:
        x = leaf(5)
        out = run(make(x), x)
        out.sum().backward()
        return out, grads([x])

    assert_exact(program, replays=1)


# What goes in.


def test_keyword_arguments() -> None:
    def function(a: Tensor, *, weight: Tensor, scale: float = 1.0, bias: Any = None) -> Tensor:
        out = torch.sin(a @ weight) * scale
        return out if bias is None else torch.tanh(out + bias)

    def program(run: Run) -> Any:
        a, w, b = leaf(3, 4), leaf(4, 4), leaf(4)
        first = run(function, a, weight=w, scale=0.3)
        second = run(function, a=first, bias=b, weight=w)
        second.sum().backward()
        return first, second, grads([a, w, b])

    assert_exact(program, replays=2)


@dataclass
class Settings:
    scale: float
    bias: Tensor


@both_forms
def test_nested_containers(use_reentrant: bool) -> None:
    def function(batch: Any, *, extra: Any) -> Any:
        h = torch.tanh(batch["x"][0] @ batch["x"][1][0]) * batch["pair"].left
        h = h + extra[1]["deep"].cos() * extra[0] + batch["settings"].bias.exp()
        return {"h": h.sin(), "rest": [h.cos(), (h.exp(), batch["pair"].right)]}

    def program(run: Run) -> Any:
        t = [leaf(3, 3) for _ in range(6)]
        batch = {
            "x": [t[0], (t[1],)],
            "pair": Pair(t[2], "right"),
            "settings": Settings(2.0, t[3]),
            "empty": [],
        }
        out = run(function, batch, extra=(0.7, {"deep": t[4], "none": None}))
        total = out["h"].sum() + out["rest"][0].sum() + (out["rest"][1][0] * t[5]).sum()
        total.backward()
        # A tensor inside a dataclass is none of pytree's business: the reentrant form, which runs
        # without a graph, cannot give it a gradient, and the function's use of it stays a constant.
        return out, grads(t[:3] + t[4:]) + ([] if use_reentrant else grads(t[3:4]))

    assert_exact(program, replays=1, use_reentrant=use_reentrant)


@both_forms
def test_arguments_and_outputs_that_are_no_tensors(use_reentrant: bool) -> None:
    marker = object()

    def function(x: Tensor, n: int, name: str, flags: Any, thing: object, nothing: None) -> Any:
        assert thing is marker and nothing is None and flags == (True, [1.5])
        out = x
        for _ in range(n):
            out = getattr(torch, name)(out)
        return out, n * 2, name.upper(), None, [True, 1.5], torch.arange(n)

    def program(run: Run) -> Any:
        x = leaf(4)
        out = run(function, x, 3, "sin", (True, [1.5]), marker, None)
        out[0].sum().backward()
        return list(out), grads([x])

    assert_exact(program, replays=1, use_reentrant=use_reentrant)


def test_no_tensor_arguments() -> None:
    def program(run: Run) -> Any:
        w = leaf(4, 4)
        none = run(lambda: torch.sin(w @ w).sum())
        number = run(lambda scale: torch.tanh(w * scale).sum(), 2.0)
        (none + number).backward()
        return none, number, grads([w])

    assert_exact(program, replays=2)


@both_forms
def test_a_parameter_that_is_an_input_and_is_used_inside(use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        linear, x = nn.Linear(4, 4), leaf(2, 4)
        out = run(lambda h, w: torch.tanh(linear(h) @ w).exp(), x, linear.weight)
        out.sum().backward()
        return out, grads([x]), grads(linear)

    assert_exact(program, replays=1, use_reentrant=use_reentrant)


def test_one_tensor_given_several_times() -> None:
    def program(run: Run) -> Any:
        x = leaf(4, 4)
        out = run(lambda a, b, *, c: torch.sin(a @ b) * c[0], x, x, c=[x])
        out.sum().backward()
        return out, grads([x])

    assert_exact(program, replays=1)


def test_only_closed_over_tensors_require_grad() -> None:
    def program(run: Run) -> Any:
        model, x = block(), torch.randn(3, 6)
        out = run(model, x)
        out.sum().backward()
        return out, x.requires_grad, grads(model)

    assert_exact(program, replays=1)


# What comes out.


def test_outputs_that_do_not_require_grad_and_detached_pieces() -> None:
    def function(x: Tensor) -> Any:
        h = torch.sin(x)
        with torch.no_grad():
            scale = h.exp().mean()
        gate = torch.tanh(h).detach()
        return h.exp() * gate * scale, gate, h > 0, x.detach(), scale

    def program(run: Run) -> Any:
        x = leaf(5)
        out = run(function, x)
        (out[0] * out[1]).sum().backward()
        return list(out), grads([x])

    assert_exact(program, replays=1)


def test_an_output_that_is_an_input_or_a_view_of_one() -> None:
    def function(x: Tensor, y: Tensor) -> Any:
        return x, y.view(-1)[2:], torch.sin(x) * y

    def program(run: Run) -> Any:
        x, y = leaf(2, 3), leaf(2, 3)
        same, view, product = run(function, x, y)
        (same.exp().sum() + view.square().sum() + product.sum()).backward()
        return same, view, product, same is x, view._is_view(), grads([x, y])

    assert_exact(program, replays=1)


def test_a_function_that_returns_nothing() -> None:
    collected: list[Tensor] = []

    def program(run: Run) -> Any:
        x = leaf(3)
        value = run(lambda t: collected.append(t.sin().exp()), x)
        out = collected[0]
        out.sum().backward()
        collected.clear()
        return value, out, grads([x])

    assert_exact(program, replays=1)


# How often it runs.


@both_forms
def test_without_gradients_it_is_a_plain_call(use_reentrant: bool) -> None:
    function = Counted(lambda x, *, y: torch.sin(x) * y)
    x, y = leaf(3), leaf(3)
    with torch.no_grad():
        before = (ledger.live_segments(), ledger.live_slots())
        out = checkpointed(use_reentrant=use_reentrant)(function, x, y=y)
        assert (ledger.live_segments(), ledger.live_slots()) == before
        assert torch.equal(out, torch.sin(x) * y)
    assert function.calls == 1 and not out.requires_grad
    with torch.inference_mode():
        assert checkpointed(use_reentrant=use_reentrant)(function, x, y=y).is_inference()


@pytest.mark.parametrize("option", ["decorator", "checkpointer"])
def test_a_configured_callable_serves_many_calls(option: str) -> None:
    function = Counted(lambda x: x.sin().exp())
    options = {"use_reentrant": False, "early_stop": False}
    call = (
        torch_reprise.checkpoint(**options)(function)
        if option == "decorator"
        else functools.partial(Checkpointer(**options), function)
    )
    for _ in range(3):
        x = leaf(3)
        call(x).sum().backward()
        assert torch.equal(x.grad, torch.autograd.grad(x.sin().exp().sum(), x)[0])
    assert function.calls == 6


def test_a_list_that_changes_while_it_is_taken_apart() -> None:
    class Shrinks:
        @property
        def __class__(self) -> type:
            items.clear()
            return object

    items: list[Any] = [Shrinks(), *(object() for _ in range(1000))]
    y = checkpoint(lambda x, _: x.sin(), leaf(3), items, use_reentrant=False)
    y.sum().backward()


class Labelled(namedtuple("Pair", "a b")):
    """Has attributes besides its items."""


@both_forms
def test_tuples_with_names(use_reentrant: bool) -> None:
    def fn(x: Tensor, pair: Labelled) -> Any:
        return torch.max(x * pair.scale, 0)  # type: ignore[attr-defined]

    pair = Labelled(1, 2)
    pair.scale = 3.0  # type: ignore[attr-defined]
    x = leaf(4, 3)
    result = checkpoint(fn, x, pair, use_reentrant=use_reentrant)
    expected = fn(x, pair)
    assert type(result) is type(expected)
    assert all(map(torch.equal, result, expected))
    (found,) = torch.autograd.grad(result.values.sum(), x)
    (wanted,) = torch.autograd.grad(expected.values.sum(), x)
    assert torch.equal(found, wanted)


@both_forms
@pytest.mark.parametrize(
    "make", [weakref.proxy, lambda _: Mock(spec=Tensor)], ids=["proxy", "mock"]
)
@pytest.mark.parametrize("container", [list, tuple, lambda items: {"key": items[0]}])
def test_objects_that_say_that_they_are_tensors(
    container: Callable[[list[Any]], Any], make: Callable[[Tensor], Any], use_reentrant: bool
) -> None:
    tensor = torch.ones(4)
    x = leaf(4)
    given = container([make(tensor)])
    checkpoint(lambda t, _: t.sin(), x, given, use_reentrant=use_reentrant).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, x.detach().cos())

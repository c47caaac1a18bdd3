"""What torch documents for `torch.utils.checkpoint` holds for `torch_reprise`.

Every test runs once on torch's module and once on ours and states the result that both must have;
where the result is a number, it is the bits of the un-checkpointed program or of torch.  The last
section has what ours adds.  `REPRISE_CHECKPOINT=torch` leaves ours out.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint as reference
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

ONLY_TORCH = os.environ.get("REPRISE_CHECKPOINT") == "torch"
MODULES = {"torch": "torch.utils.checkpoint"} | ({} if ONLY_TORCH else {"reprise": "torch_reprise"})

both_forms = pytest.mark.parametrize("reentrant", [False, True])


@pytest.fixture(params=list(MODULES))
def ck(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(MODULES[request.param])


@pytest.fixture
def ours() -> ModuleType:
    if ONLY_TORCH:
        pytest.skip("REPRISE_CHECKPOINT=torch")
    return importlib.import_module("torch_reprise")


def leaf(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (4,), generator=generator).requires_grad_()


def grad_of(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


class Trace:
    """Notes how far a function came, run by run."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def __call__(self, event: str) -> None:
        self.events.append(event)

    def take(self) -> list[str]:
        events, self.events = self.events, []
        return events


# --- the surface -------------------------------------------------------------


@pytest.mark.parametrize("name", reference.__all__)
def test_every_public_name_exists(ck: ModuleType, name: str) -> None:
    assert hasattr(ck, name)


# fmt: off
SIGNATURES = [
    "checkpoint", "checkpoint_sequential", "GraphExecGroup", "noop_context_fn", "detach_variable",
    "check_backward_validity", "set_checkpoint_early_stop", "set_checkpoint_debug_enabled",
    "get_device_states", "set_device_states",
    "DefaultDeviceType.get_device_type", "DefaultDeviceType.set_device_type",
    "create_selective_checkpoint_contexts", "SelectiveCheckpointContext",
]
# fmt: on


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(ours: ModuleType, name: str) -> None:
    """What torch has: same names, order, kinds and defaults; more may follow by keyword."""

    def parameters(module: ModuleType) -> dict[str, inspect.Parameter]:
        function = functools.reduce(getattr, name.split("."), module)
        return dict(inspect.signature(function).parameters)

    theirs, mine = parameters(reference), parameters(ours)
    by_keyword = inspect.Parameter.KEYWORD_ONLY

    def in_order(parameters: dict[str, inspect.Parameter]) -> list[str]:
        return [n for n, p in parameters.items() if n in theirs and p.kind is not by_keyword]

    assert set(theirs) <= set(mine)
    assert in_order(mine) == in_order(theirs)
    for parameter in (mine[n] for n in mine if n not in theirs):
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert parameter.default is not inspect.Parameter.empty
    for key, parameter in theirs.items():
        assert mine[key].kind is parameter.kind, key
        if key == "context_fn":
            assert mine[key].default is ours.noop_context_fn
        elif (name, key) == ("checkpoint", "function"):
            assert mine[key].default in (inspect.Parameter.empty, None)  # None: the decorator form
        else:
            assert mine[key].default == parameter.default, key


@pytest.mark.parametrize(
    "name",
    [
        "create_selective_checkpoint_contexts",
        "CheckpointPolicy",
        "SelectiveCheckpointContext",
        "SAC_IGNORED_OPS",
    ],
)
def test_selective_names_are_those_of_torch(ours: ModuleType, name: str) -> None:
    assert getattr(ours, name) is getattr(reference, name)


def test_checkpoint_error_is_caught_by_existing_code(ck: ModuleType) -> None:
    assert issubclass(ck.CheckpointError, reference.CheckpointError)
    assert issubclass(ck.CheckpointError, RuntimeError)


# --- results -----------------------------------------------------------------


def block(x: Tensor, weight: Tensor) -> Tensor:
    return F.dropout(F.gelu(x @ weight), 0.5) * x.sin()


def step(run: Callable[..., Any]) -> dict[str, Tensor]:
    torch.manual_seed(5)
    x, weight = leaf(6, 6), leaf(6, 6, seed=1)
    out = run(block, x, weight)
    after_forward = torch.get_rng_state()
    out.pow(2).sum().backward()
    return {
        "out": out.detach(),
        "x": grad_of(x),
        "weight": grad_of(weight),
        "generator after forward": after_forward,
        "generator after backward": torch.get_rng_state(),
    }


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


@both_forms
@pytest.mark.parametrize("options", [{}, {"preserve_rng_state": True}])
def test_bits_of_the_plain_program(
    ck: ModuleType, reentrant: bool, options: dict[str, Any]
) -> None:
    run = functools.partial(ck.checkpoint, use_reentrant=reentrant, **options)
    assert_same(step(run), step(lambda fn, *args: fn(*args)))


@both_forms
def test_without_preserving_the_replay_draws_on(ck: ModuleType, reentrant: bool) -> None:
    """preserve_rng_state=False: the replay draws the next numbers, and they stay drawn."""
    options = {"use_reentrant": reentrant, "preserve_rng_state": False}
    found = step(functools.partial(ck.checkpoint, **options))
    assert_same(found, step(functools.partial(reference.checkpoint, **options)))
    before, after = found["generator after forward"], found["generator after backward"]
    assert not torch.equal(before, after)
    plain = step(lambda fn, *args: fn(*args))
    assert torch.equal(found["out"], plain["out"]) and not torch.equal(found["x"], plain["x"])


@both_forms
def test_where_gradients_are_enabled(ck: ModuleType, reentrant: bool) -> None:
    """The reentrant form records no graph in the forward, the other does."""
    enabled: list[bool] = []

    def fn(x: Tensor) -> Tensor:
        enabled.append(torch.is_grad_enabled())
        return x.sin()

    out = ck.checkpoint(fn, leaf(), use_reentrant=reentrant)
    assert out.requires_grad
    assert ("SinBackward" in out.grad_fn.name()) is not reentrant
    out.sum().backward()
    assert enabled == [not reentrant, True]


@both_forms
def test_without_grad_it_is_a_call(ck: ModuleType, reentrant: bool) -> None:
    trace = Trace()

    def fn(x: Tensor) -> Tensor:
        trace(f"grad {torch.is_grad_enabled()}")
        return x.sin()

    x = leaf()
    with torch.no_grad():
        out = ck.checkpoint(fn, x, use_reentrant=reentrant)
    assert trace.take() == ["grad False"]
    assert not out.requires_grad and torch.equal(out, x.detach().sin())


def test_keyword_arguments_and_nested_structures(ck: ModuleType) -> None:
    def fn(parts: dict[str, list[Tensor]], *, scale: Tensor, power: int = 2) -> dict[str, Any]:
        first, second = parts["pair"]
        return {"out": first.sin() * second, "rest": (scale.exp() ** power, power, None)}

    def run(call: Callable[..., Any]) -> list[Tensor]:
        a, b, c = leaf(), leaf(seed=1), leaf(seed=2)
        result = call(fn, {"pair": [a, b]}, scale=c, power=3)
        assert list(result) == ["out", "rest"] and result["rest"][1:] == (3, None)
        (result["out"] * result["rest"][0]).sum().backward()
        return [grad_of(a), grad_of(b), grad_of(c)]

    found = run(functools.partial(ck.checkpoint, use_reentrant=False))
    for mine, plain in zip(found, run(lambda fn, *a, **k: fn(*a, **k)), strict=True):
        assert torch.equal(mine, plain)


def test_no_input_needs_a_gradient(ck: ModuleType) -> None:
    weight, x = leaf(), leaf().detach()
    ck.checkpoint(lambda x: (x * weight).sin(), x, use_reentrant=False).sum().backward()
    assert torch.equal(grad_of(weight), (x * weight).cos().detach() * x)


def test_detached_tensors_inside(ck: ModuleType) -> None:
    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        fixed = x.sin().detach()
        with torch.no_grad():
            other = x.exp()
        return x * fixed * other, fixed

    x = leaf()
    out, fixed = ck.checkpoint(fn, x, use_reentrant=False)
    assert out.requires_grad and not fixed.requires_grad
    out.sum().backward()
    y = leaf()
    fn(y)[0].sum().backward()
    assert torch.equal(grad_of(x), grad_of(y))


def test_autograd_grad_inputs_and_double_backward(ck: ModuleType) -> None:
    def run(call: Callable[..., Tensor]) -> list[Tensor]:
        x, y = leaf(), leaf(seed=1)
        out = call(lambda a, b: (a.sin() * b).exp(), x, y).sum()
        (first,) = torch.autograd.grad(out, x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), y, retain_graph=True)
        out.backward(inputs=[y])
        assert x.grad is None
        return [first.detach(), second, grad_of(y)]

    found = run(functools.partial(ck.checkpoint, use_reentrant=False))
    for mine, plain in zip(found, run(lambda fn, *args: fn(*args)), strict=True):
        assert torch.equal(mine, plain)


def test_backward_inside_the_function(ck: ModuleType) -> None:
    def fn(x: Tensor) -> Tensor:
        y = x.sin()
        (gradient,) = torch.autograd.grad(y.cos().sum(), x, retain_graph=True)
        return y * gradient

    for early_stop in (True, False):
        x, y = leaf(), leaf()
        ck.checkpoint(fn, x, use_reentrant=False, early_stop=early_stop).sum().backward()
        fn(y).sum().backward()
        assert torch.equal(grad_of(x), grad_of(y))


# --- ambient state that torch documents or keeps -----------------------------


@both_forms
def test_autocast_of_the_forward(ck: ModuleType, reentrant: bool) -> None:
    dtypes: list[torch.dtype] = []

    def fn(x: Tensor, weight: Tensor) -> Tensor:
        y = x @ weight
        dtypes.append(y.dtype)
        return y.float().sin()

    x, weight = leaf(4, 4), leaf(4, 4, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ck.checkpoint(fn, x, weight, use_reentrant=reentrant)
    out.sum().backward()
    x2, weight2 = leaf(4, 4), leaf(4, 4, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = fn(x2, weight2)
    plain.sum().backward()
    assert dtypes == [torch.bfloat16] * 3
    assert torch.equal(grad_of(x), grad_of(x2)) and torch.equal(grad_of(weight), grad_of(weight2))
    assert not torch.is_autocast_enabled("cpu")


def test_device_context_of_the_forward(ck: ModuleType) -> None:
    devices: list[str] = []

    def fn(x: Tensor) -> Tensor:
        ones = torch.ones(4)
        devices.append(ones.device.type)
        return (x * ones).sin()

    x = torch.zeros(4, device="meta", requires_grad=True)
    with torch.device("meta"):
        out = ck.checkpoint(fn, x, use_reentrant=False)
    out.sum().backward()
    assert devices == ["meta", "meta"]


# --- early stop --------------------------------------------------------------


def traced(trace: Trace) -> Callable[[Tensor], Tensor]:
    def fn(x: Tensor) -> Tensor:
        trace("start")
        y = x.sin()
        trace("sin")
        y = y * y
        trace("mul")
        y = y + 1
        trace("add")
        return y

    return fn


WHOLE, STOPPED = ["start", "sin", "mul", "add"], ["start", "sin"]


@pytest.mark.parametrize(
    ("argument", "context", "replay"),
    [
        (None, None, STOPPED),
        (True, None, STOPPED),
        (False, None, WHOLE),
        (None, True, STOPPED),
        (None, False, WHOLE),
        (True, False, WHOLE),
        (False, True, STOPPED),
    ],
)
def test_how_far_the_replay_runs(
    ck: ModuleType, argument: bool | None, context: bool | None, replay: list[str]
) -> None:
    """The context manager overrides the argument and needs to be active in the forward only."""
    trace, x = Trace(), leaf()
    manager = contextlib.nullcontext()
    if context is not None:
        manager = ck.set_checkpoint_early_stop(context)
    options = {} if argument is None else {"early_stop": argument}
    with manager:
        out = ck.checkpoint(traced(trace), x, use_reentrant=False, **options)
    assert trace.take() == WHOLE
    out.sum().backward()
    assert trace.take() == replay
    y = leaf()
    traced(trace)(y).sum().backward()
    assert torch.equal(grad_of(x), grad_of(y))


def test_early_stop_context_is_put_back(ck: ModuleType) -> None:
    trace = Trace()

    def replay() -> list[str]:
        out = ck.checkpoint(traced(trace), leaf(), use_reentrant=False)
        trace.take()
        out.sum().backward()
        return trace.take()

    with ck.set_checkpoint_early_stop(False):
        with pytest.raises(KeyError), ck.set_checkpoint_early_stop(True):
            assert replay() == STOPPED
            raise KeyError
        assert replay() == WHOLE
    assert replay() == STOPPED


@pytest.mark.parametrize("early_stop", [True, False])
def test_the_reentrant_form_replays_the_whole_function(ck: ModuleType, early_stop: bool) -> None:
    trace = Trace()
    with ck.set_checkpoint_early_stop(early_stop):
        out = ck.checkpoint(traced(trace), leaf(), use_reentrant=True, early_stop=early_stop)
    out.sum().backward()
    assert trace.take() == WHOLE + WHOLE


def test_nothing_is_replayed_that_nobody_needs(ck: ModuleType) -> None:
    trace, x = Trace(), leaf()

    def fn(x: Tensor) -> Tensor:
        trace("run")
        return x + 1

    ck.checkpoint(fn, x, use_reentrant=False).sum().backward()
    assert trace.take() == ["run"]
    assert torch.equal(grad_of(x), torch.ones(4))


# --- several backward calls --------------------------------------------------


def test_each_backward_replays(ck: ModuleType) -> None:
    trace, x = Trace(), leaf()
    out = ck.checkpoint(traced(trace), x, use_reentrant=False)
    out.sum().backward(retain_graph=True)
    once = grad_of(x).clone()
    out.sum().backward()
    assert trace.take().count("start") == 3
    assert torch.equal(grad_of(x), once + once)
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()


def two_branches(trace: Trace) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def fn(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        trace("run")
        return x.sin(), y.exp()

    return fn


@pytest.mark.parametrize("grouped", [True, False])
def test_graph_exec_group_shares_one_replay(ck: ModuleType, grouped: bool) -> None:
    """Two backward calls over regions that do not overlap."""
    trace, x, y = Trace(), leaf(), leaf(seed=1)
    first, second = ck.checkpoint(two_branches(trace), x, y, use_reentrant=False)
    trace.take()
    with ck.GraphExecGroup() if grouped else contextlib.nullcontext():
        first.sum().backward()
        second.sum().backward()
    assert trace.take() == ["run"] * (1 if grouped else 2)
    assert torch.equal(grad_of(x), x.detach().cos())
    assert torch.equal(grad_of(y), y.detach().exp())


def test_each_graph_exec_group_replays_anew(ck: ModuleType) -> None:
    trace, x, y = Trace(), leaf(), leaf(seed=1)
    outs = ck.checkpoint(two_branches(trace), x, y, use_reentrant=False)
    trace.take()
    for _ in range(2):
        with ck.GraphExecGroup():
            for out in outs:
                out.sum().backward(retain_graph=True)
    assert trace.take() == ["run"] * 2
    assert torch.equal(grad_of(x), x.detach().cos() * 2)


def test_graph_exec_groups_do_not_nest(ck: ModuleType) -> None:
    with ck.GraphExecGroup(), pytest.raises(RuntimeError, match="nested"):
        ck.GraphExecGroup().__enter__()
    with ck.GraphExecGroup() as group:  # the outer one was left in good order
        assert isinstance(group, ck.GraphExecGroup)


def test_graph_exec_group_is_nothing_to_the_reentrant_form(ck: ModuleType) -> None:
    trace = Trace()
    out = ck.checkpoint(traced(trace), leaf(), use_reentrant=True)
    with ck.GraphExecGroup():
        out.sum().backward(retain_graph=True)
        out.sum().backward()
    assert trace.take().count("start") == 3


# --- determinism check and debugging -----------------------------------------


class Fickle:
    """A function that saves something else from its second run on."""

    def __init__(
        self, first: Callable[[Tensor], Tensor], later: Callable[[Tensor], Tensor]
    ) -> None:
        self.first, self.later, self.runs = first, later, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.first(x) if self.runs == 1 else self.later(x)


def other_shape() -> Fickle:
    return Fickle(lambda x: x * torch.full((4,), 2.0), lambda x: x * torch.full((1,), 3.0))


@pytest.mark.parametrize(
    "function",
    [
        other_shape(),
        Fickle(lambda x: x * torch.ones(4), lambda x: x * torch.ones(4, dtype=torch.float64)),
        Fickle(lambda x: x.sin().cos(), lambda x: x.sin()),  # fewer tensors
        Fickle(lambda x: x.sin() * 2, lambda x: x * 2),  # none at all
    ],
    ids=["shape", "dtype", "fewer", "none"],
)
@pytest.mark.parametrize("early_stop", [True, False])
def test_a_replay_that_saves_something_else(
    ck: ModuleType, function: Fickle, early_stop: bool
) -> None:
    function.runs = 0
    out = ck.checkpoint(function, leaf(), use_reentrant=False, early_stop=early_stop)
    with pytest.raises(ck.CheckpointError):
        out.sum().backward()


def test_more_tensors_show_without_early_stop(ck: ModuleType) -> None:
    for early_stop in (True, False):
        function = Fickle(lambda x: x.sin() * 1.0, lambda x: x.sin().cos())
        x = leaf()
        out = ck.checkpoint(function, x, use_reentrant=False, early_stop=early_stop)
        if early_stop:
            out.sum().backward()
            assert torch.equal(grad_of(x), x.detach().cos())
        else:
            with pytest.raises(ck.CheckpointError):
                out.sum().backward()


def test_determinism_check_none(ck: ModuleType) -> None:
    """Shapes are not compared, and backward takes what the replay saved; the number still is."""
    x = leaf()
    out = ck.checkpoint(other_shape(), x, use_reentrant=False, determinism_check="none")
    out.sum().backward()
    assert torch.equal(grad_of(x), torch.full((4,), 3.0))
    fewer = Fickle(lambda x: x.sin().cos(), lambda x: x.sin())
    out = ck.checkpoint(fewer, leaf(), use_reentrant=False, determinism_check="none")
    with pytest.raises(ck.CheckpointError):
        out.sum().backward()


def test_determinism_check_of_an_unknown_value(ck: ModuleType) -> None:
    with pytest.raises(ValueError, match="default.*none"):
        ck.checkpoint(torch.sin, leaf(), use_reentrant=False, determinism_check="strict")


@pytest.mark.parametrize(
    ("argument", "context", "logged"),
    [
        (False, "no", False),
        (True, "no", True),
        (False, True, True),
        (True, False, False),
        (True, None, True),
        (False, None, False),
    ],
)
def test_debug_adds_the_operators(
    ck: ModuleType,
    argument: bool,
    context: bool | str | None,
    logged: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The context manager overrides the argument; None leaves the decision to it."""
    # torch logs operators in records that only its own handler can format.
    monkeypatch.setattr(logging.getLogger("LoggingTensor"), "propagate", False)
    fickle = Fickle(lambda x: x.sin() * torch.ones(4), lambda x: x.cos() * torch.ones(1))
    manager = contextlib.nullcontext()
    if context != "no":
        manager = ck.set_checkpoint_debug_enabled(context)
    with manager:
        out = ck.checkpoint(fickle, leaf(), use_reentrant=False, debug=argument)
    with pytest.raises(ck.CheckpointError) as error:
        out.sum().backward()
    operators = re.findall(r"aten(?:::|\.)(sin|cos)\b", str(error.value))
    del error  # its traceback holds this frame
    assert ({"sin", "cos"} <= set(operators)) is logged
    assert bool(operators) is logged


def test_reentrant_has_no_determinism_check(ck: ModuleType) -> None:
    x = leaf()
    ck.checkpoint(other_shape(), x, use_reentrant=True).sum().backward()
    assert torch.equal(grad_of(x), torch.full((4,), 3.0))


# --- context_fn --------------------------------------------------------------


def noted(trace: Trace) -> Callable[[], tuple[Any, Any]]:
    @contextlib.contextmanager
    def context(name: str) -> Iterator[None]:
        trace(f"{name} in")
        try:
            yield
        finally:
            trace(f"{name} out")

    class Again:
        """A context manager may be entered once for every replay."""

        def __enter__(self) -> None:
            self.context = context("replay")
            self.context.__enter__()

        def __exit__(self, *error: Any) -> None:
            self.context.__exit__(None, None, None)

    def context_fn() -> tuple[Any, Any]:
        trace("context_fn")
        return context("forward"), Again()

    return context_fn


@pytest.mark.parametrize("early_stop", [True, False])
def test_order_of_contexts(ck: ModuleType, early_stop: bool) -> None:
    trace = Trace()

    def fn(x: Tensor) -> Tensor:
        trace("fn")
        return x.sin()

    out = ck.checkpoint(
        fn, leaf(), use_reentrant=False, context_fn=noted(trace), early_stop=early_stop
    )
    assert trace.take() == ["context_fn", "forward in", "fn", "forward out"]
    out.sum().backward(retain_graph=True)
    assert trace.take() == ["replay in", "fn", "replay out"]
    out.sum().backward()
    assert trace.take() == ["replay in", "fn", "replay out"]


def test_contexts_are_left_when_the_function_raises(ck: ModuleType) -> None:
    trace, fail = Trace(), [True]

    def fn(x: Tensor) -> Tensor:
        if fail:
            raise KeyError("from fn")
        return x.sin().exp()

    call = functools.partial(ck.checkpoint, fn, use_reentrant=False, context_fn=noted(trace))
    with pytest.raises(KeyError, match="from fn"):
        call(leaf())
    assert trace.take() == ["context_fn", "forward in", "forward out"]
    fail.clear()
    out = call(leaf())
    trace.take()
    fail.append(True)
    with pytest.raises(KeyError, match="from fn"):
        out.sum().backward()
    assert trace.take() == ["replay in", "replay out"]


def test_a_forward_context_may_not_swallow_an_exception(ck: ModuleType) -> None:
    def fn(x: Tensor) -> Tensor:
        raise KeyError("from fn")

    def context_fn() -> tuple[Any, Any]:
        return contextlib.suppress(KeyError), contextlib.nullcontext()

    with pytest.raises(RuntimeError, match="suppress|swallow"):
        ck.checkpoint(fn, leaf(), use_reentrant=False, context_fn=context_fn)


def test_without_grad_no_context_is_entered(ck: ModuleType) -> None:
    trace = Trace()
    with torch.no_grad():
        ck.checkpoint(torch.sin, leaf(), use_reentrant=False, context_fn=noted(trace))
    assert [e for e in trace.take() if e != "context_fn"] == []


def test_noop_context_fn(ck: ModuleType) -> None:
    contexts = ck.noop_context_fn()
    assert len(contexts) == 2
    for context in contexts:
        with context:
            pass


# --- saved tensors -----------------------------------------------------------


def test_hooks_around_see_the_arguments_and_nothing_inside(ck: ModuleType) -> None:
    packed: list[tuple[int, ...]] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(tuple(t.shape))
        return t

    x, y = leaf(2, 3), leaf(3, 5)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = ck.checkpoint(lambda x, y: (x @ y).sin().exp(), x, y, use_reentrant=False)
    assert packed == [(2, 3), (3, 5)]
    out.sum().backward()
    assert packed == [(2, 3), (3, 5)]


@both_forms
def test_an_argument_changed_in_place_is_an_error(ck: ModuleType, reentrant: bool) -> None:
    x = leaf()
    middle = x * 1.0
    out = ck.checkpoint(torch.sin, middle, use_reentrant=reentrant)
    middle.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# --- the reentrant form: documented warnings and limits ----------------------


def test_use_reentrant_should_be_passed(ck: ModuleType) -> None:
    """Without it a UserWarning points at the call, and the form is the reentrant one."""
    with pytest.warns(UserWarning, match="use_reentrant") as record:
        out = ck.checkpoint(torch.sin, leaf())
    assert len(record) == 1
    assert ck is reference or record[0].filename == __file__  # torch's points into torch
    assert out.grad_fn is not None and "Checkpoint" in out.grad_fn.name()


def test_reentrant_without_an_input_that_needs_a_gradient(ck: ModuleType) -> None:
    weight = leaf()
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        out = ck.checkpoint(lambda x: x * weight, torch.ones(4), use_reentrant=True)
    assert not out.requires_grad


@pytest.mark.parametrize(
    "options", [{"context_fn": lambda: reference.noop_context_fn()}, {"debug": True}]
)
def test_reentrant_refuses_context_fn_and_debug(ck: ModuleType, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="use_reentrant=False"):
        ck.checkpoint(torch.sin, leaf(), use_reentrant=True, **options)


def test_reentrant_with_an_output_that_is_detached(ck: ModuleType) -> None:
    out = ck.checkpoint(lambda x: x.detach() * 2, leaf(), use_reentrant=True)
    with pytest.raises(RuntimeError, match="requires.grad"):
        out.sum().backward()


def test_reentrant_inputs_and_outputs_that_are_no_tensors(ck: ModuleType) -> None:
    def fn(x: Tensor, factor: float, nothing: None, flag: bool) -> tuple[Tensor, Tensor, str, None]:
        assert nothing is None and flag is True
        return x * factor, (x > 0), "tag", None

    x = leaf()
    out, mask, tag, nothing = ck.checkpoint(fn, x, 2.5, None, True, use_reentrant=True)
    assert (tag, nothing) == ("tag", None)
    assert torch.equal(mask, x.detach() > 0) and not mask.requires_grad
    out.sum().backward()
    assert torch.equal(grad_of(x), torch.full((4,), 2.5))


def test_checkpoint_function(ck: ModuleType) -> None:
    torch.manual_seed(3)
    x = leaf(8)
    out = ck.CheckpointFunction.apply(lambda x, p: F.dropout(x.exp(), p), True, x, 0.5)
    out.sum().backward()
    assert torch.equal(grad_of(x), out.detach())  # of exp, and of the mask


# --- checkpoint_sequential ---------------------------------------------------


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.runs = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return F.dropout(torch.tanh(self.linear(x)), 0.25)


@both_forms
@pytest.mark.parametrize("container", [nn.Sequential, lambda *m: list(m)], ids=["module", "list"])
@pytest.mark.parametrize(
    ("functions", "segments"), [(1, 1), (2, 1), (4, 2), (6, 3), (3, 3), (6, 2)]
)
def test_sequential(
    ck: ModuleType, container: Callable[..., Any], functions: int, segments: int, reentrant: bool
) -> None:
    """The bits of the plain run; all but the last chunk run twice."""

    def run(call: Callable[..., Tensor]) -> tuple[list[Tensor], list[int]]:
        torch.manual_seed(1)
        modules = [Counted() for _ in range(functions)]
        x = leaf(3, 4)
        out = call(container(*modules), x)
        out.sum().backward()
        parameters = [grad_of(p) for m in modules for p in m.parameters()]
        return [out.detach(), grad_of(x), *parameters], [m.runs for m in modules]

    def plain(functions: Any, x: Tensor) -> Tensor:
        for function in functions:
            x = function(x)
        return x

    found, runs = run(
        lambda modules, x: ck.checkpoint_sequential(modules, segments, x, use_reentrant=reentrant)
    )
    chunk = functions // segments
    assert runs == [2] * (functions - chunk) + [1] * chunk
    for mine, expected in zip(found, run(plain)[0], strict=True):
        assert torch.equal(mine, expected)


@both_forms
@pytest.mark.parametrize("preserve", [True, False])
def test_sequential_preserve_rng_state(ck: ModuleType, preserve: bool, reentrant: bool) -> None:
    def run(module: ModuleType) -> list[Tensor]:
        torch.manual_seed(2)
        x = leaf(4, 8)
        functions = [functools.partial(F.dropout, p=0.5), torch.sin, torch.exp, torch.tanh]
        out = module.checkpoint_sequential(
            functions, 2, x, use_reentrant=reentrant, preserve_rng_state=preserve
        )
        out.sum().backward()
        return [out.detach(), grad_of(x), torch.get_rng_state()]

    for mine, theirs in zip(run(ck), run(reference), strict=True):
        assert torch.equal(mine, theirs)


def test_sequential_warns_and_refuses(ck: ModuleType) -> None:
    with pytest.warns(UserWarning, match="use_reentrant") as record:
        ck.checkpoint_sequential([torch.sin, torch.exp], 2, leaf())
    assert ck is reference or record[0].filename == __file__
    with pytest.raises(ValueError, match="debug"):
        ck.checkpoint_sequential([torch.sin], 1, leaf(), use_reentrant=False, debug=True)


# --- helpers -----------------------------------------------------------------


def test_detach_variable(ck: ModuleType) -> None:
    x, y = leaf(), leaf().detach()
    first, second, text = ck.detach_variable((x * 2, y, "text"))
    assert first.is_leaf and first.requires_grad and torch.equal(first, x * 2)
    assert not second.requires_grad and second.data_ptr() == y.data_ptr() and text == "text"
    with pytest.raises(RuntimeError, match="list"):
        ck.detach_variable([x])


def test_check_backward_validity(ck: ModuleType) -> None:
    message = "None of the inputs have requires_grad=True"
    with pytest.warns(UserWarning, match=message) as record:
        ck.check_backward_validity([torch.ones(2), "text"])
    assert record[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ck.check_backward_validity([torch.ones(2), leaf()])


def test_device_states_on_the_cpu(ck: ModuleType) -> None:
    devices, states = ck.get_device_states(torch.ones(2), {"k": [torch.ones(1)]}, "text")
    assert list(devices) == [] and list(states) == []
    before = torch.get_rng_state()
    assert ck.set_device_states(devices, states) is None
    assert ck.set_device_states([0], [before], device_type="meta") is None
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_default_device_type(ck: ModuleType) -> None:
    before = ck.DefaultDeviceType.get_device_type()
    assert before == "cpu"
    try:
        assert ck.DefaultDeviceType.set_device_type("xpu") is None
        assert ck.DefaultDeviceType.get_device_type() == "xpu"
    finally:
        ck.DefaultDeviceType.set_device_type(before)


# --- selective checkpointing -------------------------------------------------


class CountOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def selective(ck: ModuleType, policy: Any, early_stop: bool = True) -> tuple[Counter[str], Tensor]:
    """Which operators ran in backward, and the gradient."""

    def fn(x: Tensor, y: Tensor) -> Tensor:
        return torch.sigmoid(torch.matmul(torch.matmul(x, y), y)).exp() * y

    x, y = leaf(4, 4), leaf(4, 4, seed=1)
    context_fn = functools.partial(ck.create_selective_checkpoint_contexts, policy)
    out = ck.checkpoint(fn, x, y, use_reentrant=False, context_fn=context_fn, early_stop=early_stop)
    loss = out.sum()
    with CountOps() as counter:
        loss.backward()
    plain_x, plain_y = leaf(4, 4), leaf(4, 4, seed=1)
    fn(plain_x, plain_y).sum().backward()
    assert torch.equal(grad_of(x), grad_of(plain_x)) and torch.equal(grad_of(y), grad_of(plain_y))
    return counter.counts, grad_of(x)


MM, SIGMOID = torch.ops.aten.mm.default, torch.ops.aten.sigmoid.default


@pytest.mark.parametrize(
    ("saved", "mm", "sigmoid", "exp"),
    # Two products forward have four in their backward.
    [([], 6, 1, 1), ([MM], 4, 1, 1), ([SIGMOID], 6, 0, 1), ([MM, SIGMOID], 4, 0, 1)],
)
def test_selective_by_a_list(
    ck: ModuleType, saved: list[Any], mm: int, sigmoid: int, exp: int
) -> None:
    counts, _ = selective(ck, saved)
    assert (counts["mm"], counts["sigmoid"], counts["exp"]) == (mm, sigmoid, exp)


def test_selective_by_a_function(ck: ModuleType) -> None:
    seen: list[tuple[str, bool, bool]] = []

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(
            (op.overloadpacket.__name__, ctx.is_recompute, isinstance(ctx.op_output, Tensor))
        )
        save = op in (MM, SIGMOID)
        return ck.CheckpointPolicy.MUST_SAVE if save else ck.CheckpointPolicy.PREFER_RECOMPUTE

    counts, _ = selective(ck, policy)
    assert (counts["mm"], counts["sigmoid"]) == (4, 0)
    assert {s for s in seen if s[0] in ("mm", "sigmoid", "exp")} == {
        ("mm", False, True),
        ("sigmoid", False, True),
        ("exp", False, True),
    }


@pytest.mark.parametrize(
    ("answer", "sigmoid"),
    [
        (True, 0),
        (False, 1),
        ("MUST_SAVE", 0),
        ("PREFER_SAVE", 0),
        ("MUST_RECOMPUTE", 1),
        ("PREFER_RECOMPUTE", 1),
    ],
)
def test_selective_policies(ck: ModuleType, answer: bool | str, sigmoid: int) -> None:
    value = answer if isinstance(answer, bool) else ck.CheckpointPolicy[answer]
    recompute = ck.CheckpointPolicy.PREFER_RECOMPUTE
    counts, _ = selective(ck, lambda ctx, op, *a, **k: value if op is SIGMOID else recompute)
    assert counts["sigmoid"] == sigmoid


def test_selective_without_early_stop(ck: ModuleType) -> None:
    counts, _ = selective(ck, [SIGMOID], early_stop=False)
    assert (counts["sigmoid"], counts["exp"]) == (0, 1)


def test_selective_notices_that_what_it_kept_was_changed(ck: ModuleType) -> None:
    def fn(x: Tensor) -> Tensor:
        y = x.sigmoid()
        z = y.exp()
        y.add_(1.0)
        return z * 2.0

    def run(**options: Any) -> Tensor:
        x = leaf()
        context_fn = functools.partial(
            ck.create_selective_checkpoint_contexts,
            [SIGMOID, torch.ops.aten.exp.default],
            **options,
        )
        # sigmoid's own saved output is outdated for the plain program, so only exp is asked for.
        middle = x * 1.0
        out = ck.checkpoint(
            lambda t: fn(t.detach().requires_grad_()) * t.sin(),
            middle,
            use_reentrant=False,
            context_fn=context_fn,
        )
        out.sum().backward()
        return grad_of(x)

    with pytest.raises(RuntimeError, match="mutated"):
        run()
    assert run(allow_cache_entry_mutation=True).shape == (4,)


def test_selective_refuses_bad_lists(ck: ModuleType) -> None:
    with pytest.raises(ValueError, match="OpOverload"):
        ck.create_selective_checkpoint_contexts([torch.ops.aten.mm])
    with pytest.raises(TypeError, match="function or a list"):
        ck.create_selective_checkpoint_contexts(3)


# --- exceptions --------------------------------------------------------------


@both_forms
@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, StopIteration])
def test_the_exception_of_the_function_is_the_one_that_arrives(
    ck: ModuleType, error: type[BaseException], reentrant: bool
) -> None:
    if ck is reference and error is StopIteration and not reentrant:
        pytest.skip("torch's generator turns StopIteration into RuntimeError")
    raised = error("from fn")

    def fn(x: Tensor) -> Tensor:
        raise raised

    with pytest.raises(error) as caught:
        ck.checkpoint(fn, leaf(), use_reentrant=reentrant)
    assert caught.value is raised
    raised.__traceback__ = None


@both_forms
def test_an_exception_of_the_replay_leaves_the_generator_alone(
    ck: ModuleType, reentrant: bool
) -> None:
    fail: list[bool] = []

    def fn(x: Tensor) -> Tensor:
        y = F.dropout(x, 0.5)
        if fail:
            raise KeyError("from the replay")
        return y.sin()

    out = ck.checkpoint(fn, leaf(), use_reentrant=reentrant)
    loss = out.sum()
    fail.append(True)
    torch.rand(3)
    before = torch.get_rng_state()
    with pytest.raises(KeyError, match="from the replay"):
        loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


# --- what ours adds ----------------------------------------------------------


def test_decorator_form(ours: ModuleType) -> None:
    trace = Trace()
    noted_fn = traced(trace)

    @ours.checkpoint(use_reentrant=False, early_stop=False)
    def layer(x: Tensor, *, factor: float) -> Tensor:
        """Documented."""
        return noted_fn(x) * factor

    assert layer.__name__ == "layer" and layer.__doc__ == "Documented."
    x, y = leaf(), leaf()
    layer(x, factor=2.0).sum().backward()
    assert trace.take() == WHOLE + WHOLE
    (noted_fn(y) * 2.0).sum().backward()
    assert torch.equal(grad_of(x), grad_of(y))


def test_reentrant_takes_keywords_and_nested_structures(ours: ModuleType) -> None:
    def fn(parts: dict[str, list[Tensor]], *, scale: Tensor) -> Tensor:
        return parts["a"][0].sin() * scale

    def run(call: Callable[..., Tensor]) -> list[Tensor]:
        x, scale = leaf(), leaf(seed=1)
        call(fn, {"a": [x]}, scale=scale).sum().backward()
        return [grad_of(x), grad_of(scale)]

    found = run(functools.partial(ours.checkpoint, use_reentrant=True))
    for mine, plain in zip(found, run(lambda fn, *a, **k: fn(*a, **k)), strict=True):
        assert torch.equal(mine, plain)


def test_reentrant_with_autograd_grad_and_inputs(ours: ModuleType) -> None:
    x, y = leaf(), leaf(seed=1)
    out = ours.checkpoint(lambda x, y: x.sin() * y.exp(), x, y, use_reentrant=True).sum()
    (gradient,) = torch.autograd.grad(out, x, retain_graph=True)
    assert torch.equal(gradient, (y.exp() * x.cos()).detach())
    out.backward(inputs=[y])
    assert x.grad is None
    assert torch.equal(grad_of(y), (x.sin() * y.exp()).detach())

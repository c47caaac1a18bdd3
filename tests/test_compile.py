"""torch.compile, export and tracers: what is theirs, what is ours, the same bits.

Backends are "eager" and "aot_eager", which do what the program says; inductor may add in another
order, with checkpointing or without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.utils.checkpoint as torch_checkpoint
from helpers import both_forms
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.fx.experimental.proxy_tensor import make_fx

import torch_reprise
from torch_reprise import Checkpointer, CheckpointError, checkpoint, checkpoint_sequential, ledger

# What Dynamo and inductor warn of when they look at anything: not about what is tested here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Model:
    """A small network, and the gradients of programs that use it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Sigmoid())
        self.x = torch.randn(4, 8, requires_grad=True)

    def plain(self, x: Tensor) -> Tensor:
        return self.body(x.sin()).sum()

    def broken(self, x: Tensor) -> Tensor:
        """The body with a place that Dynamo cannot make a graph of."""
        x = self.body[0](x)
        torch._dynamo.graph_break()
        return self.body[3](self.body[2](self.body[1](x)))

    def gradients(self, step: Callable[[Tensor], Any]) -> list[Tensor]:
        leaves = [self.x, *self.body.parameters()]
        for leaf in leaves:
            leaf.grad = None
        step(self.x)
        return [leaf.grad for leaf in leaves]  # type: ignore[misc]

    def expected(self) -> list[Tensor]:
        return self.gradients(lambda x: self.plain(x).backward())


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Graphs:
    """A backend that runs graphs as they are and keeps what was in them."""

    def __init__(self) -> None:
        self.targets: list[list[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.targets.append([str(node.target) for node in graph.graph.nodes])
        return graph


def entries(model: Model) -> dict[str, Callable[[Tensor], Tensor]]:
    decorated = checkpoint(use_reentrant=False)(model.body)
    configured = Checkpointer()
    return {
        "ours": lambda x: checkpoint(model.body, x.sin(), use_reentrant=False).sum(),
        "ours, reentrant": lambda x: checkpoint(model.body, x.sin(), use_reentrant=True).sum(),
        "ours, no form given": lambda x: checkpoint(model.body, x.sin()).sum(),
        "ours, keyword": lambda x: checkpoint(
            model.body, input=x.sin(), use_reentrant=False, preserve_rng_state=False
        ).sum(),
        "decorator": lambda x: decorated(x.sin()).sum(),
        "decorator made there": lambda x: checkpoint(use_reentrant=False)(model.body)(
            x.sin()
        ).sum(),
        "Checkpointer": lambda x: configured(model.body, x.sin()).sum(),
        "torch's": lambda x: torch_checkpoint.checkpoint(
            model.body, x.sin(), use_reentrant=False
        ).sum(),
    }


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("entry", list(entries(Model())))
def test_a_segment_in_a_compiled_function_is_the_compilers_operator(
    entry: str, installed: bool
) -> None:
    model = Model()
    expected = model.expected()
    graphs = Graphs()
    with torch_reprise.installed() if installed else contextlib.nullcontext():
        compiled = torch.compile(entries(model)[entry], backend=graphs, fullgraph=True)
        found = model.gradients(lambda x: compiled(x).backward())
    assert equal(expected, found)
    assert len(graphs.targets) == 1
    assert graphs.targets[0].count("tag_activation_checkpoint") == 1


class WithBody(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body


class WithMethods(WithBody):
    @checkpoint(use_reentrant=False)
    def method(self, x: Tensor) -> Tensor:
        return self.body(x.sin())  # type: ignore[no-any-return]

    @classmethod
    @checkpoint(use_reentrant=False)
    def of_class(cls, body: nn.Module, x: Tensor) -> Tensor:
        return body(x.sin())  # type: ignore[no-any-return]

    def forward(self, x: Tensor, how: str) -> Tensor:
        if how == "made outside":
            return decorate(self.body)(x.sin()).sum()
        found = self.method(x) if how == "method" else self.of_class(self.body, x)
        return found.sum()


decorate = checkpoint(use_reentrant=False)


@pytest.mark.parametrize("how", ["method", "class method", "made outside"])
def test_decorated_methods_in_a_compiled_module(how: str) -> None:
    model = Model()
    expected, graphs = model.expected(), Graphs()
    compiled = torch.compile(WithMethods(model.body), backend=graphs, fullgraph=True)
    assert equal(expected, model.gradients(lambda x: compiled(x, how).backward()))
    assert graphs.targets[0].count("tag_activation_checkpoint") == 1


class Decorated(WithBody):
    @checkpoint(use_reentrant=False)
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.sin()).sum()  # type: ignore[no-any-return]


@pytest.mark.parametrize("strict", [False, True])
def test_a_module_with_a_decorated_forward_is_exported(strict: bool) -> None:
    model = Model()
    exported = torch.export.export(Decorated(model.body), (model.x,), strict=strict).module()
    assert torch.equal(exported(model.x), model.plain(model.x))


def test_a_module_with_a_decorated_forward_is_traced_by_fx() -> None:
    model = Model()
    traced = torch.fx.symbolic_trace(Decorated(model.body))
    assert equal(model.expected(), model.gradients(lambda x: traced(x).backward()))


def test_what_a_compiled_function_decorates_and_returns_is_checkpointed() -> None:
    calls = []

    def double_sine(x: Tensor, times: int = 1) -> Tensor:
        calls.append(times)
        return (x * times).sin().sin()

    def make(x: Tensor) -> tuple[Tensor, Callable[..., Tensor]]:
        return x + 1, checkpoint(use_reentrant=False)(double_sine)

    _, decorated = torch.compile(make, backend="eager", fullgraph=True)(torch.ones(()))
    x = torch.ones(3, requires_grad=True)
    (found,) = torch.autograd.grad(decorated(x, times=2).sum(), x)
    assert calls == [2, 2], "once forward, once replayed"
    (expected,) = torch.autograd.grad(double_sine(x, times=2).sum(), x)
    assert torch.equal(expected, found)


@pytest.mark.parametrize("installed", [False, True])
@both_forms
def test_what_comes_after_dynamo_sees_torchs_entry(installed: bool, use_reentrant: bool) -> None:
    model = Model()
    expected = model.expected()
    with torch_reprise.installed() if installed else contextlib.nullcontext():
        compiled = torch.compile(
            lambda x: checkpoint(model.body, x.sin(), use_reentrant=use_reentrant).sum(),
            backend="aot_eager",
            fullgraph=True,
        )
        before = ledger.segments()
        found = model.gradients(lambda x: compiled(x).backward())
        assert ledger.segments() == before, "the compiler decides what is recomputed"
    assert equal(expected, found)


def test_a_policy_reaches_the_compiler() -> None:
    model = Model()
    expected = model.expected()
    asked: list[str] = []

    def policy(ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(str(operator))
        return torch_reprise.CheckpointPolicy.MUST_SAVE

    def contexts() -> Any:
        return torch_reprise.create_selective_checkpoint_contexts(policy)

    compiled = torch.compile(
        lambda x: checkpoint(model.body, x.sin(), use_reentrant=False, context_fn=contexts).sum(),
        backend="aot_eager",
        fullgraph=True,
    )
    assert equal(expected, model.gradients(lambda x: compiled(x).backward()))
    assert any("addmm" in name for name in asked)


def test_a_chain_in_a_compiled_function_has_an_operator_for_each_segment() -> None:
    model = Model()
    expected = model.expected()
    graphs = Graphs()
    compiled = torch.compile(
        lambda x: checkpoint_sequential(model.body, 4, x.sin(), use_reentrant=False).sum(),
        backend=graphs,
        fullgraph=True,
    )
    assert equal(expected, model.gradients(lambda x: compiled(x).backward()))
    assert graphs.targets[0].count("tag_activation_checkpoint") == 3


@both_forms
def test_a_compiled_function_inside_of_a_segment_is_replayed_as_such(use_reentrant: bool) -> None:
    model = Model()
    expected = model.expected()
    graphs = Graphs()
    body = torch.compile(model.body, backend=graphs)
    before = ledger.replays()
    for _ in range(2):
        found = model.gradients(
            lambda x: checkpoint(body, x.sin(), use_reentrant=use_reentrant).sum().backward()
        )
        assert equal(expected, found)
    assert ledger.replays() == before + 2
    # Once with gradients; in the reentrant form the forward runs without.
    assert len(graphs.targets) == (2 if use_reentrant else 1)


def test_compiled_functions_inside_keep_their_random_numbers() -> None:
    body = torch.compile(
        nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh(), nn.Dropout(0.5)),
        backend="eager",
    )
    results = []
    for run in (body, lambda x: checkpoint(body, x, use_reentrant=False)):
        torch.manual_seed(1)
        x = torch.ones(4, 8, requires_grad=True)
        run(x).sum().backward()
        results.append([x.grad, torch.get_rng_state()])
    assert equal(*results)  # type: ignore[arg-type]


@pytest.mark.parametrize("installed", [False, True])
@both_forms
def test_a_segment_with_a_graph_break_is_ours(installed: bool, use_reentrant: bool) -> None:
    model = Model()
    expected = model.expected()
    with torch_reprise.installed() if installed else contextlib.nullcontext():
        compiled = torch.compile(
            lambda x: checkpoint(model.broken, x.sin(), use_reentrant=use_reentrant).sum(),
            backend="aot_eager",
        )
        before = ledger.replays()
        assert equal(expected, model.gradients(lambda x: compiled(x).backward()))
        assert ledger.replays() == before + 1


def test_a_replay_that_a_compiled_step_calls_runs_without_dynamo() -> None:
    model = Model()
    expected = model.expected()

    def step(x: Tensor) -> None:
        checkpoint(model.broken, x.sin(), use_reentrant=False).sum().backward()

    before = ledger.replays()
    compiled = torch.compile(step, backend="aot_eager")
    for _ in range(2):
        assert equal(expected, model.gradients(compiled))
    assert ledger.replays() == before + 2


@pytest.mark.parametrize("segments", [1, 3])
def test_a_compiled_backward_replays_each_segment_once(segments: int) -> None:
    model = Model()

    def chain(x: Tensor, checkpointed: bool) -> Tensor:
        x = x.sin()
        for _ in range(segments):
            x = checkpoint(model.body, x, use_reentrant=False) if checkpointed else model.body(x)
        return x.sum()

    expected = model.gradients(lambda x: chain(x, False).backward())

    def step(x: Tensor) -> None:
        loss = chain(x, True)
        with compiled_autograd._enable(lambda graph: graph):
            loss.backward()

    before = ledger.replays()
    assert equal(expected, model.gradients(step))
    assert ledger.replays() == before + segments
    assert ledger.live_segments() == 0


def test_a_compiled_backward_through_dynamo_is_exact_and_warns_of_nothing() -> None:
    model = Model()
    expected = model.expected()

    def step(x: Tensor) -> None:
        loss = checkpoint(model.body, x.sin(), use_reentrant=False).sum()
        with compiled_autograd._enable(torch.compile(backend="eager")):
            loss.backward()

    assert equal(expected, model.gradients(step))


def test_the_reentrant_form_under_a_compiled_backward_is_an_error_that_says_what_to_do() -> None:
    model = Model()
    loss = checkpoint(model.body, model.x.sin(), use_reentrant=True).sum()
    with (
        pytest.raises(CheckpointError, match="Sequential .*compiled autograd.*use_reentrant=False"),
        compiled_autograd._enable(lambda graph: graph),
    ):
        loss.backward()


@pytest.mark.parametrize("strict", [False, True])
@both_forms
def test_an_exported_program_computes_the_same(strict: bool, use_reentrant: bool) -> None:
    model = Model()

    class Program(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model.body

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, x.sin(), use_reentrant=use_reentrant)

    # The reentrant form warns of inputs without gradients, as torch's does.
    example = torch.randn(4, 8, requires_grad=use_reentrant)
    exported = torch.export.export(Program(), (example,), strict=strict)
    assert torch.equal(exported.module()(model.x), model.body(model.x.sin()))


@both_forms
def test_a_traced_gradient_is_exact(use_reentrant: bool) -> None:
    model = Model()
    expected = model.expected()[0]

    def gradient(x: Tensor) -> Tensor:
        loss = checkpoint(model.body, x.sin(), use_reentrant=use_reentrant).sum()
        return torch.autograd.grad(loss, x)[0]

    before = ledger.segments()
    traced = make_fx(gradient)(model.x)
    assert ledger.segments() == before
    assert torch.equal(traced(model.x), expected)


def test_inductor_makes_the_same_program_of_ours_and_of_torchs() -> None:
    model = Model()
    found = []
    for entry in ("ours", "torch's"):
        torch._dynamo.reset()
        compiled = torch.compile(entries(model)[entry], fullgraph=True)
        found.append(model.gradients(lambda x, compiled=compiled: compiled(x).backward()))  # type: ignore[misc]
    assert equal(*found)


def test_random_numbers_in_a_graph_that_nobody_compiles() -> None:
    """Dynamo's graph asks for no random state, and "eager" runs it as it is."""
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Tanh())
    x = torch.randn(3, 4, requires_grad=True)

    def step(x: Tensor) -> Tensor:
        result: Tensor = torch_checkpoint.checkpoint(module, x, use_reentrant=False)
        return result

    def outcome(fn: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(3)
        (gradient,) = torch.autograd.grad(fn(x).sum(), x)
        return [gradient, torch.get_rng_state()]

    with torch_reprise.installed():
        found = outcome(torch.compile(step, backend="eager"))
    assert all(map(torch.equal, found, outcome(module)))

"""What a function changes besides its result happens once; what it reaches is as it was."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    Run,
    assert_exact,
    both_forms,
    grads,
    leaf,
    message_of,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_reprise
from torch_reprise import Checkpointer, CheckpointError, checkpoint, is_recomputing


def buffers(module: nn.Module) -> list[Tensor]:
    return [b.clone() for b in module.buffers()]


class Counter(nn.Module):
    """Changes a buffer, and computes with what it was before."""

    count: Tensor

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.tanh(x * (1 + self.count.clone().mean()))
        with torch.no_grad():
            self.count += 1
        return out * 2


class OwnNorm(nn.Module):
    """Running statistics that no version counter tells of, under names of its own."""

    mu: Tensor
    sigma: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mu", torch.zeros(3))
        self.register_buffer("sigma", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mu, self.sigma, training=self.training)


class Codebook(nn.Module):
    """Larger than what is copied without asking."""

    codes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(64, 512))

    def forward(self, x: Tensor) -> Tensor:
        nearest = (x @ self.codes.clone().t()).argmax(dim=1)
        chosen = self.codes[nearest]
        with torch.no_grad():
            self.codes[nearest] = 0.9 * self.codes[nearest] + 0.1 * x
        return torch.tanh(x * chosen)


class Replaced(nn.Module):
    """Gives itself another tensor for a buffer, the first time for one that was not there."""

    mean: Tensor
    seen: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(3))
        self.register_buffer("seen", None)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.detach().clone() if self.seen is None else self.seen + x.detach()
        x = x * self.mean + self.seen
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(dim=0)
        return (x * self.mean).sin()


class Saved(nn.Module):
    """Backward needs the buffer as it is after the change."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.ones(3))
        self.register_buffer("again", self.count.view(3))  # shares the counter of versions

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return (x * self.count).sin()


def conv_block() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3))


def spectral() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))


def old_spectral() -> nn.Module:
    return nn.utils.spectral_norm(nn.Linear(3, 3))


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "BatchNorm": (lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh()), (5, 3)),
    "BatchNorm without momentum": (lambda: nn.BatchNorm1d(3, momentum=None), (5, 3)),
    "InstanceNorm": (lambda: nn.InstanceNorm1d(3, track_running_stats=True), (2, 3, 7)),
    "convolution": (conv_block, (2, 2, 8, 8)),
    "counter": (Counter, (5, 3)),
    "own statistics": (OwnNorm, (5, 3)),
    "spectral norm": (spectral, (5, 3)),
    "spectral norm by hooks": (old_spectral, (5, 3)),
    "codebook": (Codebook, (4, 512)),
    "replaced": (Replaced, (5, 3)),
}


def call_itself(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return module


def call_in_a_closure(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: module(x)


def call_a_method(module: nn.Module) -> Callable[[Tensor], Tensor]:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = module
            self.other = nn.Linear(2, 2)

        def run(self, x: Tensor) -> Tensor:
            return self.block(x)  # type: ignore[no-any-return]

    return Holder().run


def call_through_self(module: nn.Module) -> Callable[[Tensor], Tensor]:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([module])

        def segment(self) -> Callable[[Tensor], Tensor]:
            return lambda x: self.blocks[0](x)

    return Holder().segment()


def call_by_partial(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return functools.partial(lambda module, x: module(x), module)


CALLS = [call_itself, call_in_a_closure, call_a_method, call_through_self, call_by_partial]


@both_forms
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", MODULES)
def test_buffers_are_changed_once(
    name: str, call: Callable[[nn.Module], Callable[[Tensor], Tensor]], use_reentrant: bool
) -> None:
    make, shape = MODULES[name]

    def program(run: Run) -> Any:
        module = make()
        function = call(module)
        results = []
        for _ in range(3):
            x, y = leaf(*shape), leaf(*shape)
            first, second = run(function, x), run(function, y)
            results.append((first, second, buffers(module)))
            # One backward each: the reentrant form adds two calls' gradients in another order.
            for out in first, second:
                out.square().sum().backward()
                results.append((grads([x, y]), grads(module), buffers(module)))
                module.zero_grad()
        return results

    assert_exact(program, replays=6, use_reentrant=use_reentrant)


@both_forms
def test_a_changed_buffer_that_backward_needs(use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        module, x = Saved(), leaf(4, 3)
        results = []
        for _ in range(3):
            out = run(module, x)
            out.square().sum().backward()
            results.append((out, buffers(module)))
        return results, grads([x])

    assert_exact(program, replays=3, use_reentrant=use_reentrant)


@both_forms
def test_a_buffer_that_was_replaced_is_given_back_also_after_an_error(use_reentrant: bool) -> None:
    module, x = Replaced(), leaf(4, 3)
    out = checkpoint(module, x, use_reentrant=use_reentrant, early_stop=False)
    mean, seen = module.mean, module.seen

    def refuse(*_: Any) -> None:
        raise ValueError("no")

    module.register_forward_hook(refuse)
    with pytest.raises(ValueError, match="no"):
        out.sum().backward()
    assert module.mean is mean
    assert module.seen is seen


def test_a_buffer_is_the_same_object_with_the_same_version_after_a_replay() -> None:
    module = Counter()
    out = checkpoint(module, leaf(2, 3), use_reentrant=False)
    before, version, address = module.count, module.count._version, module.count.data_ptr()
    out.sum().backward()
    assert module.count is before
    assert module.count._version == version
    assert module.count.data_ptr() == address


def test_a_view_of_a_buffer_sees_what_the_forward_saw() -> None:
    class Viewed(Counter):
        def __init__(self) -> None:
            super().__init__(4)
            self.half = self.count[:2]

        def forward(self, x: Tensor) -> Tensor:
            out = torch.tanh(x * (1 + self.half.clone().mean()))
            with torch.no_grad():
                self.count.add_(1)
            return out

    def program(run: Run) -> Any:
        module, x = Viewed(), leaf(3)
        out = run(module, run(module, x))
        out.sum().backward()
        return out, grads([x]), module.count.clone(), module.half.clone()

    assert_exact(program)


def test_a_replay_that_raises_leaves_buffers_alone() -> None:
    class Raising(Counter):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            self.calls += 1
            if self.calls == 2:
                raise KeyError("in the replay")
            return torch.tanh(out)

    module = Raising()
    out = checkpoint(module, leaf(2, 3), use_reentrant=False)
    with pytest.raises(KeyError):
        out.sum().backward()
    assert torch.equal(module.count, torch.ones(3))


def test_a_closed_over_counter_is_changed_once() -> None:
    def program(run: Run) -> Any:
        count = torch.zeros(3)

        def function(x: Tensor) -> Tensor:
            out = torch.tanh(x + count.clone())
            count.add_(1)
            return out

        x = leaf(3)
        out = run(function, run(function, x))
        out.sum().backward()
        return out, grads([x]), count

    assert_exact(program)


def test_replays_with_retain_graph_all_begin_with_the_same_values() -> None:
    def program(run: Run) -> Any:
        module, x = Counter(), leaf(2, 3)
        out = run(module, x)
        out.sum().backward(retain_graph=True)
        out.sum().backward()
        return out, grads([x]), buffers(module)

    assert_exact(program, replays=2)


def test_nested_segments_change_a_buffer_once() -> None:
    def program(run: Run) -> Any:
        module, x = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), Counter()), leaf(5, 3)
        out = run(lambda x: torch.tanh(run(module, run(module, x))), x)
        out.square().sum().backward()
        return out, grads([x]), grads(module), buffers(module)

    assert_exact(program)


class Codebook(nn.Module):
    """Larger than what is copied at every call."""

    entries: Tensor

    def __init__(self, through_data: bool) -> None:
        super().__init__()
        self.register_buffer("entries", torch.rand(3, 8192))
        self.through_data = through_data

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.entries[:, 0].clone()
        if self.training:
            with torch.no_grad():
                entries = self.entries.data if self.through_data else self.entries
                entries.mul_(0.9).add_(1)
        return (y * self.entries[:, 1].clone()).tanh()


@both_forms
@pytest.mark.parametrize("place", ["argument", "keyword", "list"])
def test_an_object_that_is_given_twice_keeps_what_the_forward_did(
    place: str, use_reentrant: bool
) -> None:
    class State:
        def __init__(self) -> None:
            self.seen = 1.0
            self.kept: list[Tensor] = []

    def fn(x: Tensor, state: State, config: State) -> Tensor:
        state.seen += 1
        state.kept.append(x.detach())
        return (x * config.seen * len(config.kept)).tanh()

    def program(run: Run) -> Any:
        state, x, outs = State(), leaf(3), []
        for _ in range(2):
            if place == "argument":
                outs.append(run(fn, x, state, state))
            elif place == "keyword":
                outs.append(run(fn, x, state, config=state))
            else:
                outs.append(run(lambda x, states: fn(x, *states), x, [state, state]))
            outs[-1].sum().backward()
        return outs, grads([x]), state.seen, state.kept

    assert_exact(program, replays=2, use_reentrant=use_reentrant)


@both_forms
@pytest.mark.parametrize("through_data", [False, True], ids=["in place", "data"])
@pytest.mark.parametrize("nested", [False, True], ids=["alone", "nested"])
def test_a_large_buffer_is_changed_once_from_the_first_step_on(
    nested: bool, through_data: bool, use_reentrant: bool
) -> None:
    def program(run: Run) -> Any:
        module, x, outs = Codebook(through_data), leaf(4, 3), []
        for step in range(4):
            module.train(step != 1)
            outs.append(run(lambda x: run(module, x.sin()) if nested else module(x), x))
            outs[-1].sum().backward()
        return outs, grads([x]), module.entries[:, :2].clone()

    assert_exact(program, use_reentrant=use_reentrant)


def test_submodules_that_come_and_go_are_seen() -> None:
    def program(run: Run) -> Any:
        module = nn.Sequential(nn.Linear(3, 3))
        results = []
        for step in range(3):
            if step == 1:
                module.append(nn.BatchNorm1d(3))
            if step == 2:
                module[1] = Counter()
            x = leaf(5, 3)
            out = run(module, x)
            out.square().sum().backward()
            results.append((out, grads([x]), buffers(module)))
        return results

    assert_exact(program)


def test_preserve_state_off_lets_the_replay_count_again() -> None:
    module = Counter()
    out = Checkpointer(preserve_state=False, early_stop=False)(module, leaf(2, 3))
    out.sum().backward()
    assert torch.equal(module.count, torch.full((3,), 2.0))


# --- Training and evaluation ---------------------------------------------------------------------


@both_forms
@pytest.mark.parametrize("call", CALLS)
def test_a_module_is_replayed_in_the_mode_of_its_forward(
    call: Callable[[nn.Module], Callable[[Tensor], Tensor]], use_reentrant: bool
) -> None:
    def program(run: Run) -> Any:
        module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Tanh())
        function = call(module)
        x = leaf(5, 3)
        out = run(function, x)
        module.eval()
        also = run(function, x)
        module.train()
        module[2].eval()
        (out.square().sum() + also.sum()).backward()
        return out, also, grads([x]), grads(module), [m.training for m in module.modules()]

    assert_exact(program, use_reentrant=use_reentrant)


# --- Changes between forward and replay ----------------------------------------------------------


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + self.shift)  # autograd does not save the shift


@both_forms
def test_a_changed_parameter_is_named(use_reentrant: bool) -> None:
    module = Affine()
    out = checkpoint(module, leaf(3), use_reentrant=use_reentrant)
    with torch.no_grad():
        module.shift.add_(1)
    text = message_of(CheckpointError, lambda: out.sum().backward())
    assert "'shift' of a Affine was modified by an inplace operation" in text
    assert "Affine" in text


def test_a_changed_closed_over_tensor_is_named() -> None:
    offset = torch.zeros(3)
    out = checkpoint(lambda x: torch.tanh(x + offset), leaf(3), use_reentrant=False)
    offset.add_(1)
    assert "'offset', which the function reaches by its name" in message_of(
        CheckpointError, lambda: out.sum().backward()
    )


def test_a_parameter_that_was_exchanged_is_no_matter_of_ours() -> None:
    module, x = Affine(), leaf(3)
    old = module.shift
    out = checkpoint(module, x, use_reentrant=False)
    module.shift = nn.Parameter(old.detach().clone())
    with torch.no_grad():
        old.add_(1)
    out.sum().backward()
    assert x.grad is not None


def test_other_layers_may_be_stepped_while_backward_runs() -> None:
    """A step as soon as a layer has its gradients, with segments that close over self."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Affine() for _ in range(3))
            for parameter in self.parameters():
                parameter.register_post_accumulate_grad_hook(self.step)

        @staticmethod
        def step(parameter: Tensor) -> None:
            with torch.no_grad():
                assert parameter.grad is not None
                parameter -= 0.1 * parameter.grad
            parameter.grad = None

        def run_layer(self, x: Tensor, i: int) -> Tensor:
            return self.layers[i](x)  # type: ignore[no-any-return]

        def forward(self, run: Run, x: Tensor) -> Tensor:
            for i in range(3):
                x = run(lambda x, i=i: self.layers[i](x), x) if i % 2 else run(self.run_layer, x, i)
            return x

    def program(run: Run) -> Any:
        model, x = Model(), leaf(3)
        out = model(run, x)
        out.sum().backward()
        return out, grads([x]), list(model.parameters())

    assert_exact(program)


def test_containers_among_the_arguments_are_handed_over_as_they_were() -> None:
    def program(run: Run) -> Any:
        def function(x: Tensor, cache: list[Tensor], notes: dict[str, Any]) -> Tensor:
            out = torch.tanh(x * cache.pop()) + len(cache)
            notes["n"] = notes.get("n", 0) + 1
            cache.append(out.detach())
            return out * notes["n"]

        x, cache, notes = leaf(3), [torch.ones(3), torch.full((3,), 2.0)], {}
        out = run(function, run(function, x, cache, notes), cache, notes)
        out.sum().backward()
        return out, grads([x]), cache, notes

    assert_exact(program)


@pytest.mark.parametrize("training", [True, False])
def test_rrelu_fills_what_it_saved(training: bool) -> None:
    def program(run: Run) -> Any:
        x = leaf(200, 300)
        out = run(lambda x: F.rrelu(x * 2, training=training), x)
        out.square().sum().backward()
        return out, grads([x])

    assert_exact(program)


# --- is_recomputing ------------------------------------------------------------------------------


@both_forms
def test_is_recomputing(use_reentrant: bool) -> None:
    seen: list[bool] = []

    def function(x: Tensor) -> Tensor:
        seen.append(is_recomputing())
        return torch.tanh(x)

    out = checkpoint(function, leaf(3), use_reentrant=use_reentrant)
    assert not is_recomputing()
    out.sum().backward()
    assert seen == [False, True]
    assert not is_recomputing()
    assert torch_reprise.is_recomputing is is_recomputing


# --- what the function's names stand for


@both_forms
@pytest.mark.parametrize("kind", ["lambda", "partial", "function"])
def test_names_stand_for_what_they_stood_for(kind: str, use_reentrant: bool) -> None:
    """Functions that are made in a loop close over the loop's variable, not over its value."""
    layers = [nn.Linear(3, 3) for _ in range(3)]

    def program(run: Run) -> list[Tensor | None]:
        torch.manual_seed(0)
        x = leaf(2, 3)
        h = x
        for number, layer in enumerate(layers):
            scale = torch.tensor(number + 1.0)

            def call(t: Tensor) -> Tensor:
                return (layer(t) * scale).tanh() + number  # noqa: B023

            functions: dict[str, Callable[[Tensor], Tensor]] = {
                "lambda": lambda t: (layer(t) * scale).tanh() + number,  # noqa: B023
                "partial": functools.partial(call),
                "function": call,
            }
            h = run(functions[kind], h)
        for each in layers:
            each.zero_grad()
        h.sum().backward()
        return [x.grad, *(p.grad for each in layers for p in each.parameters())]

    expected = program(lambda function, *args: function(*args))
    found = program(functools.partial(checkpoint, use_reentrant=use_reentrant))
    assert all(map(torch.equal, found, expected))


late_factor = 1.0


@both_forms
def test_globals_stand_for_what_they_stood_for(use_reentrant: bool) -> None:
    global late_factor

    def fn(x: Tensor) -> Tensor:
        return torch.stack([(row * late_factor).sin() for row in x]).exp()

    found = []
    for run in (None, functools.partial(checkpoint, use_reentrant=use_reentrant)):
        torch.manual_seed(0)
        x = leaf(2, 3)
        late_factor = 2.0
        y = fn(x) if run is None else run(fn, x)
        late_factor = 5.0
        y.sum().backward()
        assert late_factor == 5.0, "as the program left it"
        found.append(x.grad)
    assert found[0] is not None and found[1] is not None
    assert torch.equal(found[0], found[1])


@both_forms
def test_a_name_that_the_function_sets_is_its_own(use_reentrant: bool) -> None:
    calls = 0

    def fn(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x.sin().exp()

    y = checkpoint(fn, leaf(3), use_reentrant=use_reentrant)
    calls = 10
    y.sum().backward()
    assert calls == 11


@both_forms
def test_a_replay_under_functional_call_has_its_parameters(use_reentrant: bool) -> None:
    class Net(nn.Module):
        def __init__(self, run: Run) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
            self.run = run

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.run(self.block, x)
            return result.sin()

    def program(run: Run) -> list[Tensor | None]:
        torch.manual_seed(3)
        net = Net(run)
        own = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
        x = leaf(2, 3)
        twice = {name: 2 * p for name, p in own.items()}
        y = torch.func.functional_call(net, twice, (x,))
        before = {name: id(p) for name, p in net.named_parameters()}
        y.sum().backward()
        assert before == {name: id(p) for name, p in net.named_parameters()}
        # The reentrant form has gradients for arguments and leaves alone.
        return [x.grad] if use_reentrant else [x.grad, *(p.grad for p in own.values())]

    expected = program(lambda function, *args: function(*args))
    found = program(functools.partial(checkpoint, use_reentrant=use_reentrant))
    assert all(map(torch.equal, found, expected))


# --- what is reached


@both_forms
def test_names_in_inner_code_are_reached(use_reentrant: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def comprehension(self, x: Tensor) -> Tensor:
            return torch.stack([self.norm(part) for part in x.unbind(0)]).sin()

        @torch.autocast("cpu", dtype=torch.bfloat16)
        def decorated(self, x: Tensor) -> Tensor:
            result: Tensor = self.norm(x[0])
            return result.sin()

    for method in ("comprehension", "decorated"):
        counted = []
        for run in (lambda f, x: f(x), functools.partial(checkpoint, use_reentrant=use_reentrant)):
            torch.manual_seed(0)
            net = Net()
            x = leaf(2, 4, 3)
            run(getattr(net, method), x).sum().backward()
            counted.append([x.grad, *net.buffers()])
        assert all(map(torch.equal, *counted)), method


@both_forms
def test_objects_among_the_arguments_are_looked_into(use_reentrant: bool) -> None:
    @dataclasses.dataclass
    class Config:
        generator: torch.Generator
        norm: nn.Module

    def fn(x: Tensor, config: Config) -> Tensor:
        noise = torch.rand(x.shape, generator=config.generator)
        result: Tensor = config.norm(x * noise)
        return result.sin()

    found = []
    for run in (
        lambda f, *args: f(*args),
        functools.partial(checkpoint, use_reentrant=use_reentrant),
    ):
        torch.manual_seed(0)
        config = Config(torch.Generator().manual_seed(5), nn.BatchNorm1d(3))
        x = leaf(4, 3)
        y = run(fn, x, config)
        torch.rand(3, generator=config.generator)
        y.sum().backward()
        found.append([x.grad, config.generator.get_state(), *config.norm.buffers()])
    assert all(map(torch.equal, *found))


class Clamped(nn.Module):
    """Does to its parameter what is the same twice."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((3,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.scale.clamp_(-1, 1)
        return x * self.scale


def test_a_parameter_that_the_function_changes_is_named() -> None:
    y = checkpoint(Clamped(), leaf(2, 3), use_reentrant=False)
    with pytest.raises(CheckpointError, match="(?s)changes 'scale' .*preserve_state=False"):
        y.sum().backward()
    x, again = leaf(2, 3), leaf(2, 3)
    Checkpointer(preserve_state=False)(Clamped(), x).sum().backward()
    Clamped()(again).sum().backward()
    assert x.grad is not None and again.grad is not None
    assert torch.equal(x.grad, again.grad)


def embedding_with_max_norm(kind: str, trained: bool) -> nn.Module:
    """Scaling its rows twice is not the same to the last bit as scaling them once."""
    torch.manual_seed(0)
    made: nn.Module
    if kind == "bag":
        made = nn.EmbeddingBag(40, 65, max_norm=3.0, mode="sum")
    else:
        made = nn.Embedding(40, 65, max_norm=3.0)
    return made.requires_grad_(trained)


EMBEDDINGS = pytest.mark.parametrize("kind", ["embedding", "bag"])


@EMBEDDINGS
def test_scaling_an_embedding_twice_is_not_scaling_it_once(kind: str) -> None:
    """What the next test is about; if this fails, torch has become exact."""
    module = embedding_with_max_norm(kind, trained=True)
    index = torch.arange(40).view(8, 5)
    module(index)
    once = module.weight.detach().clone()
    module(index)
    assert not torch.equal(once, module.weight)


@both_forms
@EMBEDDINGS
@pytest.mark.parametrize("trained", [True, False])
def test_an_embedding_with_max_norm_is_scaled_once(
    kind: str, trained: bool, use_reentrant: bool
) -> None:
    found = []
    for run in (
        lambda f, *args: f(*args),
        functools.partial(checkpoint, use_reentrant=use_reentrant),
    ):
        module = embedding_with_max_norm(kind, trained)
        linear = nn.Linear(65, 3)

        def fn(
            x: Tensor, index: Tensor, module: nn.Module = module, linear: nn.Module = linear
        ) -> Tensor:
            return linear(module(index).tanh()).tanh() * x

        x = leaf(1)
        for _ in range(3):
            run(fn, x, torch.arange(40).view(8, 5)).sum().backward()
        assert module.max_norm == 3.0
        assert x.grad is not None
        found.append([x.grad, module.weight.detach(), linear.weight.grad])
        if trained:
            found[-1].append(module.weight.grad)
    assert all(map(torch.equal, *found))


def test_an_attribute_of_that_name_is_left_alone_elsewhere() -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            assert self.max_norm is not None
            return F.embedding(input, self.weight) * self.max_norm

    found = []
    for run in (lambda f, *args: f(*args), functools.partial(checkpoint, use_reentrant=False)):
        torch.manual_seed(0)
        module = Scaled(4, 3, max_norm=0.1)
        x = leaf(1)
        run(lambda x, module: (module(torch.arange(4)) * x).sin(), x, module).sum().backward()
        found.append([x.grad, module.weight.grad])
    assert all(map(torch.equal, *found))


def test_an_embedding_that_is_scaled_more_than_once_is_an_error() -> None:
    module = embedding_with_max_norm("embedding", trained=True)
    index = torch.arange(10)

    def twice(x: Tensor) -> Tensor:
        return (module(index) * x).tanh() + module(index)

    with pytest.raises(CheckpointError, match="(?s)changes 'weight' of a Embedding"):
        checkpoint(twice, leaf(1), use_reentrant=False).sum().backward()

    def once(x: Tensor) -> Tensor:
        return (module(index) * x).tanh()

    y = checkpoint(once, leaf(1), use_reentrant=False)
    z = checkpoint(once, leaf(1), use_reentrant=False)
    with pytest.raises(CheckpointError, match="(?s)'weight' of a Embedding was modified"):
        (y + z).sum().backward()


def test_a_lazy_module_gets_its_memory_in_a_segment() -> None:
    found = []
    for run in (lambda f, x: f(x), functools.partial(checkpoint, use_reentrant=False)):
        torch.manual_seed(0)
        module = nn.Sequential(nn.LazyLinear(3), nn.Tanh())
        x = leaf(2, 3)
        run(module, x).sum().backward()
        found.append([x.grad, *(p.grad for p in module.parameters())])
    assert all(map(torch.equal, *found))


def test_what_others_set_on_an_argument_during_a_replay_stays() -> None:
    class State:
        calls = 0
        stop = False

        def __init__(self) -> None:
            self.log: list[str] = []

    def fn(x: Tensor, state: State) -> Tensor:
        state.calls += 1
        if is_recomputing():  # stands for a signal handler or another thread
            state.stop = True
            state.log.append("seen")
        return x.sin().exp()

    state = State()
    y = checkpoint(fn, leaf(3), state, use_reentrant=False)
    y.sum().backward()
    assert (state.calls, state.stop, state.log) == (1, True, ["seen"])


def test_hooks_that_copy_do_not_make_a_replay_use_changed_values() -> None:
    def fn(x: Tensor) -> Tensor:
        a = x.exp()
        b = a.sin()
        a.mul_(2)
        return b * a

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        y = checkpoint(fn, leaf(3), use_reentrant=False)
    with pytest.raises(CheckpointError, match="changes a tensor in place that backward needs"):
        y.sum().backward()


@pytest.mark.parametrize("options", [{"debug": True}, {"preserve_host_rng": True}])
def test_checks_of_versions_do_not_depend_on_other_options(options: dict[str, Any]) -> None:
    y = Checkpointer(**options)(torch.exp, leaf(3))
    y.mul_(2)
    with pytest.raises(CheckpointError, match="modified by an inplace operation"):
        (y * y).sum().backward()


def test_an_argument_that_is_given_twice_is_one_object() -> None:
    def fn(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sin() if a is b else a.exp() * b

    def outer(run: Run, h: Tensor) -> Tensor:
        result: Tensor = run(fn, h * 2, h * 2) + run(lambda t: run(fn, t, t), h)
        return result

    gradients = []
    for run in (lambda f, *args: f(*args), functools.partial(checkpoint, use_reentrant=False)):
        torch.manual_seed(0)
        x = leaf(3)
        run(functools.partial(outer, run), x).sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    assert torch.equal(*gradients)
    x = leaf(3)
    again = x.detach().clone().requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        y = checkpoint(fn, x, x, use_reentrant=False)
    y.sum().backward()
    fn(again, again).sum().backward()
    assert x.grad is not None and again.grad is not None
    assert torch.equal(x.grad, again.grad)


# --- what is changed between forward and backward


def frozen_for_the_forward(run: Run) -> list[Any]:
    """The step of a generator: its critic does not learn from it."""
    maker = nn.Linear(4, 4)
    critic = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    critic.requires_grad_(False)
    loss = run(critic, maker(torch.randn(4, 4))).square().mean()
    critic.requires_grad_(True)
    loss.backward()
    assert all(p.requires_grad and p.grad is None for p in critic.parameters())
    return grads(maker)


def frozen_after_the_forward(run: Run) -> list[Any]:
    maker = nn.Linear(4, 4)
    critic = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    loss = run(critic, maker(torch.randn(4, 4))).square().mean()
    critic.requires_grad_(False)
    loss.backward()
    assert not any(p.requires_grad for p in critic.parameters())
    return [*grads(maker), *grads(critic)]


def argument_that_requires_grad_later(run: Run) -> list[Any]:
    x, z = leaf(4), torch.randn(4)
    y = run(lambda x, z: (x * z).sin() * z.exp(), x, z)
    z.requires_grad_()
    y.sum().backward()
    assert z.requires_grad and z.grad is None
    return [x.grad]


def function_that_freezes(run: Run) -> list[Any]:
    """A function may change it as well: the replay begins as the forward did."""
    module, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), leaf(3, 4)

    def fn(x: Tensor) -> Tensor:
        hidden = module[:2](x)
        module.requires_grad_(False)
        out: Tensor = module[2](hidden)
        return out

    run(fn, x).square().sum().backward()
    assert not any(p.requires_grad for p in module.parameters())
    return [x.grad]


class Scaled(nn.Module):
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((4,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale).sin()


def buffer_that_is_assigned(run: Run) -> list[Any]:
    module, x = Scaled(), leaf(3, 4)
    y = run(module, x)
    module.scale = module.scale * 3
    y.sum().backward()
    return [x.grad, module.scale]


def buffers_of_functional_call(make: Callable[[], nn.Module], run: Run) -> list[Any]:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = run(self.inner, x)
            return out.tanh()

    net, x = Net(), leaf(3, 4)
    given = {name: torch.full_like(buffer, 3) for name, buffer in net.named_buffers()}
    torch.func.functional_call(net, given, (x,)).sum().backward()
    return [x.grad, *net.buffers(), *given.values()]


BETWEEN: dict[str, Callable[[Run], list[Any]]] = {
    "frozen for the forward": frozen_for_the_forward,
    "frozen after the forward": frozen_after_the_forward,
    "an argument requires grad later": argument_that_requires_grad_later,
    "the function freezes": function_that_freezes,
    "a buffer is assigned": buffer_that_is_assigned,
    "functional_call with a buffer": functools.partial(buffers_of_functional_call, Scaled),
    "functional_call with statistics": functools.partial(
        buffers_of_functional_call, lambda: nn.BatchNorm1d(4)
    ),
    "functional_call with statistics, in evaluation": functools.partial(
        buffers_of_functional_call, lambda: nn.BatchNorm1d(4).eval()
    ),
}


@both_forms
@pytest.mark.parametrize("name", BETWEEN)
def test_what_is_changed_between_forward_and_backward(name: str, use_reentrant: bool) -> None:
    assert_exact(BETWEEN[name], use_reentrant=use_reentrant)


# --- modules of TorchScript, and without values


@both_forms
@pytest.mark.parametrize("how", ["scripted", "traced", "in another module"])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Converting a tensor:torch.jit.TracerWarning")
def test_buffers_of_torchscript_modules(how: str, use_reentrant: bool) -> None:
    def program(run: Run) -> list[Any]:
        module: Any = nn.BatchNorm1d(4)
        module = (
            torch.jit.trace(module, torch.randn(3, 4))
            if how == "traced"
            else torch.jit.script(module)
        )
        if how == "in another module":
            module = nn.Sequential(nn.Tanh(), module)
        x = leaf(3, 4)
        for _ in range(2):
            run(module, x).sin().sum().backward()
        return [x.grad, *module.buffers()]

    assert_exact(program, use_reentrant=use_reentrant)


@both_forms
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_the_mode_of_torchscript_modules(use_reentrant: bool) -> None:
    def program(run: Run) -> list[Any]:
        module: Any = torch.jit.script(nn.InstanceNorm1d(4, track_running_stats=True))
        x = leaf(3, 4, 5)
        y = run(module, x)
        module.eval()
        y.square().sum().backward()
        assert not module.training
        return [x.grad]

    assert_exact(program, use_reentrant=use_reentrant)


@both_forms
@pytest.mark.parametrize("fake", [False, True])
def test_buffers_without_values(fake: bool, use_reentrant: bool) -> None:
    with FakeTensorMode() if fake else contextlib.nullcontext():
        device = "cpu" if fake else "meta"
        module = nn.BatchNorm1d(4, device=device)
        x = torch.randn(3, 4, device=device, requires_grad=True)
        checkpoint(module, x, use_reentrant=use_reentrant).sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape

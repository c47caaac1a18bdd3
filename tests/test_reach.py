"""What a module reaches is found again after it has changed, however often it was found before."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Run, assert_exact, both_forms, grads, leaf
from torch import Tensor, nn

from torch_reprise import CheckpointError, checkpoint


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Counter(nn.Module):
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += 1
        return x * (1 + self.count)


class Everything(nn.Module):
    """Draws from and changes what it reaches in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.parts = nn.ModuleList([Counter()])
        self.generator = generator(2)
        self.listed = [generator(3)]
        self.named = {"a": generator(4)}
        inside = generator(5)

        def draw(other: torch.Generator | None = None) -> Tensor:
            nonlocal inside
            inside = inside if other is None else other
            return torch.rand(4, generator=inside)

        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        if not self.scale.requires_grad:
            with torch.no_grad():
                self.scale += 1
        x = self.linear(x) * (self.scale + 0)
        for part in self.parts:
            x = part(x).sin()
        for drawn_from in (self.generator, *self.listed, *self.named.values()):
            x = (x + torch.rand(4, generator=drawn_from)).sin()
        return (x * self.draw()).tanh()


def with_list(module: Everything) -> None:
    module.listed.append(generator(11))


def with_dict(module: Everything) -> None:
    module.named["b"] = generator(12)


def with_generator(module: Everything) -> None:
    module.generator = generator(13)


def with_closure(module: Everything) -> None:
    module.draw(generator(15))


def with_buffer(module: Everything) -> None:
    counter = module.parts[0]
    assert isinstance(counter, Counter)
    counter.count = torch.full((), 7.0)


def with_submodule(module: Everything) -> None:
    module.parts.append(nn.Sequential(Counter(), nn.BatchNorm1d(4)))


def without_submodule(module: Everything) -> None:
    module.parts[0] = nn.BatchNorm1d(4)


def in_evaluation(module: Everything) -> None:
    module.eval()


def frozen(module: Everything) -> None:
    module.scale.requires_grad_(False)


def with_parameter(module: Everything) -> None:
    module.linear.weight = nn.Parameter(torch.eye(4))


def with_attributes(module: Everything) -> None:
    module.__dict__ = {**vars(module), "generator": generator(16)}


CHANGES: list[Callable[[Everything], None]] = [
    with_list,
    with_dict,
    with_generator,
    with_closure,
    with_buffer,
    with_submodule,
    without_submodule,
    in_evaluation,
    frozen,
    with_parameter,
    with_attributes,
]


@both_forms
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_seen(change: Callable[[Everything], None], use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        module, x = Everything(), leaf(3, 4)
        kept: list[Any] = []

        def steps(count: int) -> None:
            for _ in range(count):
                out = run(module, x)
                out.sum().backward()
                kept.extend([out, grads([x, *module.parameters()])])
                kept.extend(buffer.clone() for buffer in module.buffers())

        steps(3)
        change(module)
        steps(2)
        return kept

    assert_exact(program, use_reentrant=use_reentrant, replays=5)


class Restless(nn.Module):
    """Sets an attribute in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.counter = Counter()
        self.generator = generator(1)

    def forward(self, x: Tensor) -> Tensor:
        self.last = x.shape
        return (self.counter(x).sin() * torch.rand(4, generator=self.generator)).sin()


def test_a_module_whose_forward_sets_attributes() -> None:
    def program(run: Run) -> Any:
        module, x = Restless(), leaf(3, 4)
        outs = []
        for _ in range(20):
            outs.append(run(module, x))
            outs[-1].sum().backward()
        module.generator = generator(2)
        outs.append(run(module, x))
        outs[-1].sum().backward()
        return outs, grads([x]), module.counter.count

    assert_exact(program, replays=21)


def test_modules_at_an_address_that_was_used_before() -> None:
    def program(run: Run) -> Any:
        x, outs = leaf(3, 4), []
        for seed in range(30):
            module = Everything()
            module.generator = generator(seed)
            outs.append(run(module, x))
            outs[-1].sum().backward()
            outs.extend(buffer.clone() for buffer in module.buffers())
            del module
        return outs, grads([x])

    assert_exact(program, replays=30)


def test_modules_that_share_a_part_count_it_once() -> None:
    def program(run: Run) -> Any:
        shared = Counter()
        first, second = nn.Sequential(shared, nn.Tanh()), nn.Sequential(nn.Tanh(), shared)
        x, outs = leaf(3, 4), []
        for _ in range(3):
            outs.append(run(lambda t: second(first(t)).sin(), x))
            outs[-1].sum().backward()
        return outs, grads([x]), shared.count

    assert_exact(program, replays=3)


def as_a_function(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: module(x)


def as_a_method(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return module.forward


def as_a_partial(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return functools.partial(module.forward)


def as_a_method_of_an_object(module: nn.Module) -> Callable[[Tensor], Tensor]:
    class Holder:
        def __init__(self) -> None:
            self.module = module

        def call(self, x: Tensor) -> Tensor:
            return self.module(x)

    return Holder().call


AS_A_CALLABLE = [as_a_function, as_a_method, as_a_partial, as_a_method_of_an_object]


@both_forms
@pytest.mark.parametrize("place", ["argument", "list", "keyword", "closure", "partial"])
@pytest.mark.parametrize("made", AS_A_CALLABLE)
def test_what_functions_among_the_arguments_and_in_the_closure_reach(
    made: Callable[[nn.Module], Callable[[Tensor], Tensor]], place: str, use_reentrant: bool
) -> None:
    class Drawing(Counter):
        def __init__(self) -> None:
            super().__init__()
            self.generator = generator(30)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sin() * torch.rand(4, generator=self.generator)

    def apply(function: Any, x: Tensor) -> Tensor:
        return (function[0] if isinstance(function, list) else function)(x).tanh()

    def program(run: Run) -> Any:
        module, x, outs = Drawing(), leaf(3, 4), []
        for _ in range(2):
            function = made(module)
            outs.append(
                run(apply, function, x)
                if place == "argument"
                else run(apply, [function], x)
                if place == "list"
                else run(lambda x, *, inner: apply(inner, x), x, inner=function)
                if place == "keyword"
                else run(lambda x: apply(function, x), x)  # noqa: B023
                if place == "closure"
                else run(functools.partial(apply, function), x)
            )
            outs[-1].sum().backward()
        return outs, grads([x]), module.count, module.generator.get_state()

    assert_exact(program, replays=2, use_reentrant=use_reentrant)


@both_forms
def test_what_a_function_among_the_arguments_reaches_may_be_changed(use_reentrant: bool) -> None:
    """It may be called at another time, or never."""

    def program(run: Run) -> Any:
        student, teacher, x = nn.Linear(3, 3), nn.Linear(3, 3), leaf(2, 3)

        def update() -> None:
            with torch.no_grad():
                for new, old in zip(student.parameters(), teacher.parameters(), strict=True):
                    old.mul_(0.9).add_(new, alpha=0.1)

        out = run(lambda x, at_end: student(x).sin(), x, update)
        update()
        out.sum().backward()
        return out, grads([x]), grads(student), list(teacher.parameters())

    assert_exact(program, replays=1, use_reentrant=use_reentrant)


def test_a_long_chain_of_functions() -> None:
    def chained(inner: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: x if inner is None else inner(x)

    function = None
    for _ in range(60_000):
        function = chained(function)
    x = leaf(3)
    checkpoint(lambda x, unused: x.sin(), x, function, use_reentrant=False).sum().backward()
    assert x.grad is not None
    while function is not None:  # or freeing it takes as deep a stack
        function = function.__closure__[0].cell_contents


FIRST, SECOND = generator(20), generator(21)


@both_forms
@pytest.mark.parametrize("kind", [lambda call: call, staticmethod], ids=["method", "static"])
def test_a_class_whose_call_is_replaced_is_looked_at_anew(
    kind: Callable[[Any], Any], use_reentrant: bool
) -> None:
    def program(run: Run) -> Any:
        class Drawing:
            def __call__(self, x: Tensor) -> Tensor:
                return x.sin() * torch.rand(4, generator=FIRST)

        def other(*args: Tensor) -> Tensor:
            return args[-1].sin() * torch.rand(4, generator=SECOND)

        FIRST.manual_seed(22)
        SECOND.manual_seed(23)
        drawing, x, outs = Drawing(), leaf(4), []
        for call in (Drawing.__call__, kind(other), Drawing.__call__):
            Drawing.__call__ = call  # type: ignore[method-assign]
            for _ in range(3):
                outs.append(run(drawing, x))
                outs[-1].sum().backward()
        return outs, grads([x]), FIRST.get_state(), SECOND.get_state()

    assert_exact(program, replays=9, use_reentrant=use_reentrant)


@both_forms
def test_a_static_method_that_is_given_another_function_is_looked_at_anew(
    use_reentrant: bool,
) -> None:
    def program(run: Run) -> Any:
        class Drawing:
            @staticmethod
            def forward(x: Tensor) -> Tensor:
                return x.sin() * torch.rand(4, generator=FIRST)

            def __call__(self, x: Tensor) -> Tensor:
                return self.forward(x)

        FIRST.manual_seed(24)
        SECOND.manual_seed(25)
        drawing, x, outs = Drawing(), leaf(4), []
        for generator in (FIRST, SECOND):
            # A change of the type that its version does not show.
            Drawing.__dict__["forward"].__init__(
                eval(
                    "lambda x: x.sin() * torch.rand(4, generator=G)",
                    {"torch": torch, "G": generator},
                )
            )
            for _ in range(2):
                outs.append(run(drawing, x))
                outs[-1].sum().backward()
        return outs, grads([x]), FIRST.get_state(), SECOND.get_state()

    assert_exact(program, replays=4, use_reentrant=use_reentrant)


IN_A_SEARCH = """
import gc
import torch
from torch_reprise import checkpoint

class Script(torch.jit.RecursiveScriptModule):
    def modules(self):  # which the search for buffers asks
        Called.__call__ = lambda self, x: x.exp()
        gc.collect()
        return iter([])

script = Script.__new__(Script)

def made():
    inside = script
    def __call__(self, x, *, default=(script,)):
        return inside and (x.sin() if first_global else second_global)
    return __call__

class Called:
    pass

x = torch.ones(3, requires_grad=True)
for _ in range(5):
    Called.__call__ = made()
    out = checkpoint(Called(), x, use_reentrant=False)
    assert torch.equal(out, x.exp())
    out.sum().backward()
print("done")
"""


def test_a_function_that_goes_while_it_is_searched() -> None:
    # Freed memory is overwritten at once under this allocator.
    run = subprocess.run(
        [sys.executable, "-c", IN_A_SEARCH],
        env={**os.environ, "PYTHONMALLOC": "debug"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (run.returncode, run.stdout) == (0, "done\n"), run.stderr


def test_a_changed_parameter_is_named_after_many_calls() -> None:
    module, x = Everything(), leaf(3, 4)
    for _ in range(3):
        checkpoint(module, x, use_reentrant=False).sum().backward()
    out = checkpoint(module, x, use_reentrant=False)
    with torch.no_grad():
        module.scale.mul_(2)
    with pytest.raises(CheckpointError, match="'scale' of a Everything"):
        out.sum().backward()

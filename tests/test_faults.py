"""An error anywhere, in the forward, a replay or backward, leaves nothing behind.

Each program runs once per operator that it executes, with an error raised at that operator. After
it the generators, the settings, the hook stack and the counters are as they were, and the next step
is exact.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Run, checkpointed, grads, leaf, plain, top_hooks
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)

import torch_reprise
from torch_reprise import CheckpointPolicy, create_selective_checkpoint_contexts, ledger

ERRORS = (ValueError, KeyboardInterrupt, MemoryError, torch.cuda.OutOfMemoryError)


class FaultAt(TorchDispatchMode):
    """Raises at the operator with this number; counts them all if there is none."""

    def __init__(self, number: int | None = None) -> None:
        super().__init__()
        self.number = number
        self.seen = 0
        self.in_replay = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        number = self.seen
        self.seen += 1
        if number == self.number:
            self.in_replay = torch_reprise.is_recomputing()
            raise ERRORS[number % len(ERRORS)](f"at operator {number}, {func}")
        return func(*args, **(kwargs or {}))


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Tanh())


def simple(run: Run, model: nn.Module, x: Tensor) -> Tensor:
    return run(model, x)  # type: ignore[no-any-return]


def nested(run: Run, model: nn.Module, x: Tensor) -> Tensor:
    def outer(x: Tensor) -> Tensor:
        return torch.sigmoid(run(model, torch.sin(x)))

    return run(outer, x)  # type: ignore[no-any-return]


def under_settings(run: Run, model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16), torch.device("cpu"):
        torch.set_default_dtype(torch.float64)
        try:
            return run(lambda x: torch.tanh(model(x) * torch.ones(3)), x).float()
        finally:
            torch.set_default_dtype(torch.float32)


def with_backward_inside(run: Run, model: nn.Module, x: Tensor) -> Tensor:
    def function(x: Tensor) -> Tensor:
        with torch.enable_grad():
            local = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(run(model, local).square().sum(), local)
        return torch.tanh(x * slope)

    return run(function, x)  # type: ignore[no-any-return]


def with_a_generator(run: Run, model: nn.Module, x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return run(lambda x: model(x) * torch.rand(3, generator=generator), x)  # type: ignore[no-any-return]


def two_in_a_row(run: Run, model: nn.Module, x: Tensor) -> Tensor:
    return run(model, torch.relu(run(model, x)))  # type: ignore[no-any-return]


PROGRAMS = [simple, nested, under_settings, with_backward_inside, with_a_generator, two_in_a_row]


def state() -> list[Any]:
    return [
        torch.get_default_dtype(),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_enabled("cpu"),
        torch.is_grad_enabled(),
        top_hooks(),
        list(_get_current_function_mode_stack()),
        list(_get_current_dispatch_mode_stack()),
        torch_reprise.is_recomputing(),
    ]


Program = Callable[[Run, nn.Module, Tensor], Tensor]


def a_step(program: Program, run: Run, model: nn.Module) -> list[Tensor]:
    x = leaf(4, 3)
    out = program(run, model, x)
    out.square().sum().backward()
    result = [out.detach(), *(g for g in [*grads([x]), *grads(model)] if g is not None)]
    model.zero_grad()
    return [*result, *(b.clone() for b in model.buffers()), torch.get_rng_state()]


@pytest.mark.needs_gc  # tracebacks hold frames
@pytest.mark.parametrize("options", [{}, {"use_reentrant": True}], ids=["hooks", "reentrant"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_an_error_at_every_operator(program: Program, options: dict[str, Any]) -> None:
    run = checkpointed(**options)
    torch.manual_seed(1)
    model = block()
    x = leaf(4, 3)
    with FaultAt() as counting:
        out = program(run, model, x).square().sum()
        in_forward = counting.seen
        out.backward()
    total = counting.seen
    del out
    assert total > in_forward > 5
    before = state()
    for number in range(total):
        torch.manual_seed(number)
        x = leaf(4, 3)
        try:
            with FaultAt(number) as fault:
                out = program(run, model, x).square().sum()
                with _disable_current_modes():
                    generator, buffers = torch.get_rng_state(), [b.clone() for b in model.buffers()]
                out.backward()
            # A replay that has all it needs may pass over an error of the operator that it leaves.
            assert fault.in_replay, f"no error at operator {number} of {total}"
        except ERRORS:
            assert fault.seen == number + 1, "an operator ran after the error"
        assert state() == before, f"operator {number}"
        if number >= in_forward:
            assert torch.equal(torch.get_rng_state(), generator), f"operator {number}"
            for have, want in zip(model.buffers(), buffers, strict=True):
                assert torch.equal(have, want), f"operator {number}"
            del out
        model.zero_grad()
    gc.collect()
    assert ledger.live_segments() == 0
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    found = a_step(program, run, model)
    model.load_state_dict(saved)
    torch.manual_seed(5)
    expected = a_step(program, plain, model)
    for have, want in zip(found, expected, strict=True):
        assert torch.equal(have, want)


@pytest.mark.needs_gc
def test_an_error_at_every_operator_with_selective_checkpointing() -> None:
    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = op in (torch.ops.aten.addmm.default, torch.ops.aten.native_dropout.default)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    run = checkpointed(context_fn=lambda: create_selective_checkpoint_contexts(policy))
    model = block()
    x = leaf(4, 3)
    with FaultAt() as counting:
        simple(run, model, x).square().sum().backward()
    before = state()
    for number in range(counting.seen):
        try:
            with FaultAt(number):
                simple(run, model, x).square().sum().backward()
            pytest.fail(f"no error at operator {number}")
        except ERRORS:
            pass
        assert state() == before
    gc.collect()
    assert ledger.live_segments() == 0

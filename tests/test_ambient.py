"""What besides its arguments decides what a function computes, set in the forward only."""

from __future__ import annotations

import contextvars
import ctypes
import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import pytest
import torch
from helpers import (
    AlteredFunction,
    AlteredOperator,
    Program,
    Run,
    assert_exact,
    both_forms,
    grads,
    leaf,
    message_of,
    setting,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from torch_reprise import Checkpointer, CheckpointError, checkpoint, is_recomputing, ledger


def cudnn_flag(name: str, value: Any) -> Any:
    return setting(
        lambda: getattr(torch.backends.cudnn, name),
        lambda new: setattr(torch.backends.cudnn, name, new),
        value,
    )


def deterministic(mode: str) -> Any:
    return setting(
        torch.get_deterministic_debug_mode,
        torch.set_deterministic_debug_mode,
        mode,
    )


def precision_of(backend: Any, value: str) -> Any:
    return setting(
        lambda: backend.fp32_precision, lambda new: setattr(backend, "fp32_precision", new), value
    )


# What is set, and how a function sees it.
SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "default dtype": (
        lambda: setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
        torch.get_default_dtype,
    ),
    "matmul precision": (
        lambda: setting(
            torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
        ),
        torch.get_float32_matmul_precision,
    ),
    "mkldnn matmul precision": (
        lambda: precision_of(torch.backends.mkldnn.matmul, "bf16"),
        lambda: torch.backends.mkldnn.matmul.fp32_precision,
    ),
    "cudnn conv precision": (
        lambda: precision_of(torch.backends.cudnn.conv, "ieee"),
        lambda: torch.backends.cudnn.conv.fp32_precision,
    ),
    "deterministic": (lambda: deterministic("error"), torch.get_deterministic_debug_mode),
    "deterministic, warn only": (lambda: deterministic("warn"), torch.get_deterministic_debug_mode),
    "fill": (
        lambda: setting(
            lambda: torch.utils.deterministic.fill_uninitialized_memory,
            lambda new: setattr(torch.utils.deterministic, "fill_uninitialized_memory", new),
            False,
        ),
        lambda: torch.utils.deterministic.fill_uninitialized_memory,
    ),
    "cudnn": (lambda: cudnn_flag("enabled", False), lambda: torch.backends.cudnn.enabled),
    "cudnn benchmark": (
        lambda: cudnn_flag("benchmark", True),
        lambda: torch.backends.cudnn.benchmark,
    ),
    "cudnn deterministic": (
        lambda: cudnn_flag("deterministic", True),
        lambda: torch.backends.cudnn.deterministic,
    ),
    "mkldnn": (
        lambda: setting(torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled, False),
        torch._C._get_mkldnn_enabled,
    ),
    "nnpack": (
        lambda: torch.backends.nnpack.flags(enabled=False),
        torch._C._get_nnpack_enabled,
    ),
    "sdpa": (lambda: sdpa_kernel(SDPBackend.MATH), torch.backends.cuda.flash_sdp_enabled),
    "sdpa order": (
        lambda: sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], set_priority=True),
        torch._C._get_sdp_priority_order,
    ),
    "fp16 reduction": (
        lambda: setting(
            lambda: torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
            lambda new: setattr(
                torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", new
            ),
            False,
        ),
        lambda: torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
    ),
    "default device": (lambda: torch.device("meta"), lambda: torch.empty(0).device),
}


def watching(read: Callable[[], Any]) -> tuple[list[Any], Callable[[Tensor], Tensor]]:
    """A function, and what it saw in each of its calls."""
    seen: list[Any] = []

    def function(x: Tensor) -> Tensor:
        seen.append(read())
        return torch.tanh(x)

    return seen, function


@both_forms
@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_of_the_forward_is_in_force_in_the_replay(name: str, use_reentrant: bool) -> None:
    enter, read = SETTINGS[name]
    seen, function = watching(read)
    outside = read()
    x = leaf(3)
    with enter():
        inside = read()
        out = checkpoint(function, x, use_reentrant=use_reentrant)
    assert inside != outside, "the test does not change anything"
    out.sum().backward()
    assert seen == [inside, inside]
    assert read() == outside


@both_forms
@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_of_backward_is_not_in_force_in_the_replay(
    name: str, use_reentrant: bool
) -> None:
    enter, read = SETTINGS[name]
    seen, function = watching(read)
    outside = read()
    x = leaf(3)
    out = checkpoint(function, x, use_reentrant=use_reentrant).sum()
    with enter():
        out.backward(torch.ones((), device="cpu"))
        assert read() != outside, "the setting of backward is back after the replay"
    assert seen == [outside, outside]


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_put_back_after_a_replay_that_raises(name: str) -> None:
    enter, read = SETTINGS[name]
    outside = read()
    calls = 0

    def function(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyError("in the replay")
        return torch.tanh(x)

    with enter():
        out = checkpoint(function, leaf(3), use_reentrant=False)
    with pytest.raises(KeyError):
        out.sum().backward()
    assert read() == outside


@both_forms
def test_attention_under_a_backend_that_only_the_forward_names(use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        q = leaf(2, 3, 8, 4)
        with sdpa_kernel(SDPBackend.MATH):
            out = run(lambda q: scaled_dot_product_attention(q, q, q, is_causal=True), q)
        out.square().sum().backward()
        return out, grads([q])

    assert_exact(program, use_reentrant=use_reentrant)


def default_dtype_program(run: Run) -> Any:
    x = leaf(4, dtype=torch.float64)
    with setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64):
        out = run(lambda x: torch.tanh(x) * torch.linspace(0, 1, 4), x)
    out.sum().backward()
    return out, grads([x])


VARIABLE: contextvars.ContextVar[float] = contextvars.ContextVar("scale", default=1.0)


def context_variable_program(run: Run) -> Any:
    x = leaf(4)
    token = VARIABLE.set(3.0)
    out = run(lambda x: torch.tanh(x * VARIABLE.get()), x)
    VARIABLE.reset(token)
    out.sum().backward()
    return out, grads([x]), VARIABLE.get()


def changed_context_variable_program(run: Run) -> Any:
    def function(x: Tensor) -> Tensor:
        VARIABLE.set(VARIABLE.get() + 1)
        return torch.tanh(x * VARIABLE.get())

    def all_of_it() -> Any:
        x = leaf(4)
        out = run(function, x)
        after = VARIABLE.get()
        out.sum().backward()
        return out, grads([x]), after, VARIABLE.get()

    return contextvars.copy_context().run(all_of_it)


def doubled_tanh() -> AlteredFunction:
    return AlteredFunction(torch.tanh, lambda result: result * 2)


def halved_tanh() -> AlteredOperator:
    return AlteredOperator(torch.ops.aten.tanh.default, lambda result: result / 2)


def in_the_forward(run: Run, *entered: AbstractContextManager[object]) -> Any:
    x = leaf(4)
    with ExitStack() as stack:
        for context in entered:
            stack.enter_context(context)
        out = run(lambda x: torch.tanh(x).square(), x)
    out.sum().backward()
    return out, grads([x])


def function_mode_program(run: Run) -> Any:
    return in_the_forward(run, doubled_tanh())


def dispatch_mode_program(run: Run) -> Any:
    return in_the_forward(run, halved_tanh())


class Doubling(Tensor):
    """A subclass by torch function alone, which C++ does not know of."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result * 2 if func is torch.tanh else result


def doubling_leaf() -> Tensor:
    return torch.randn(4).as_subclass(Doubling).requires_grad_()


def backward_of_a_subclass_program(run: Run) -> Any:
    """Such a backward runs with torch function off for subclasses."""
    x = doubling_leaf()
    out = run(lambda x: torch.tanh(x).square(), x)
    out.sum().backward()
    return out, grads([x])


def subclass_argument_program(run: Run) -> Any:
    x, seen = doubling_leaf(), set()

    def function(x: Tensor) -> Tensor:
        seen.add(type(x).__name__)
        return torch.tanh(x).square()

    out = run(function, x)
    out.as_subclass(Tensor).sum().backward()
    return out, grads([x]), sorted(seen)


def subclasses_off_program(run: Run) -> Any:
    x = doubling_leaf()
    with torch._C.DisableTorchFunctionSubclass():
        out = run(lambda x: torch.tanh(x).square(), x)
    out.as_subclass(Tensor).sum().backward()
    return out, grads([x])


def subclasses_off_in_backward_program(run: Run) -> Any:
    x = doubling_leaf()
    loss = run(lambda x: torch.tanh(x).square(), x).as_subclass(Tensor).sum()
    with torch._C.DisableTorchFunctionSubclass():
        loss.backward()
    return loss, grads([x]), torch._C._is_torch_function_enabled()


def mode_that_is_off_program(run: Run) -> Any:
    return in_the_forward(run, doubled_tanh(), torch._C.DisableTorchFunction())


def off_around_backward_program(run: Run) -> Any:
    x = leaf(4)
    with doubled_tanh():
        loss = run(lambda x: torch.tanh(x).square(), x).sum()
    with torch._C.DisableTorchFunction():
        loss.backward()
    return loss, grads([x])


def modes_in_themselves_program(run: Run) -> Any:
    x, results = leaf(4), []
    for mode in (doubled_tanh(), halved_tanh()):
        with mode, mode:
            out = run(lambda x: torch.tanh(x).square(), x)
        out.sum().backward()
        with mode, mode:
            inside = run(lambda x: torch.tanh(x).exp(), x)
        with mode:
            inside.sum().backward()
        results += [out, inside]
    return results, grads([x])


@both_forms
@pytest.mark.parametrize(
    "program",
    [
        backward_of_a_subclass_program,
        subclass_argument_program,
        subclasses_off_program,
        subclasses_off_in_backward_program,
        mode_that_is_off_program,
        off_around_backward_program,
        modes_in_themselves_program,
        default_dtype_program,
        context_variable_program,
        changed_context_variable_program,
        function_mode_program,
        dispatch_mode_program,
    ],
)
def test_programs_are_exact(program: Program, use_reentrant: bool) -> None:
    assert_exact(program, use_reentrant=use_reentrant)


def test_segments_in_a_replay_note_what_the_replay_runs_under() -> None:
    def program(run: Run) -> Any:
        x = leaf(4)

        def inner(x: Tensor) -> Tensor:
            return torch.tanh(x * torch.ones(4, dtype=torch.get_default_dtype()).sum())

        with setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64):
            out = run(lambda x: run(inner, x).square(), x)
        out.sum().backward()
        return out, grads([x])

    assert_exact(program)


def test_check_names_what_was_changed_for_good() -> None:
    x = leaf(3)
    with setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64):
        out = Checkpointer(ambient="check")(torch.tanh, x)
    state = torch.get_rng_state()
    text = message_of(CheckpointError, lambda: out.sum().backward())
    assert "default dtype was float64 in the forward, is float32 now" in text
    assert torch.equal(torch.get_rng_state(), state)
    with setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64):
        out.sum().backward()
    assert x.grad is not None


def test_check_names_a_default_device_and_a_backend() -> None:
    with torch.device("cpu"), sdpa_kernel(SDPBackend.MATH):
        out = Checkpointer(ambient="check")(torch.tanh, leaf(3))
    text = message_of(CheckpointError, lambda: out.sum().backward())
    assert "a default device was set in the forward, none is now" in text
    assert "SDPA with flash attention was False in the forward, is True now" in text


def test_check_restores_what_context_managers_end() -> None:
    def program(run: Run) -> Any:
        x = leaf(4, 4)
        with torch.autocast("cpu", torch.bfloat16):
            out = run(lambda x: torch.tanh(x @ x), x)
        out.sum().backward()
        return out, grads([x])

    before = ledger.replays()
    torch.manual_seed(0)
    found = program(Checkpointer(ambient="check"))
    assert ledger.replays() == before + 1
    torch.manual_seed(0)
    expected = program(lambda function, *args: function(*args))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1][0], expected[1][0])


def test_ignore_replays_with_what_is_there() -> None:
    seen, function = watching(torch.get_default_dtype)
    with setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64):
        out = Checkpointer(ambient="ignore")(function, leaf(3))
    out.sum().backward()
    assert seen == [torch.float64, torch.float32]


def test_an_unknown_policy_is_refused() -> None:
    assert "'restore', 'check', 'ignore'" in message_of(
        ValueError, lambda: Checkpointer(ambient="keep")
    )


def test_segments_keep_the_variables_they_began_under_and_no_longer_than_they_live() -> None:
    class Value:
        pass

    variable: contextvars.ContextVar[Value | None] = contextvars.ContextVar(
        "variable", default=None
    )
    seen: list[Value | None] = []

    def function(x: Tensor) -> Tensor:
        seen.append(variable.get())
        return x.tanh()

    first, second = Value(), Value()
    x = leaf(4)
    outs = []
    # Two under the first, one under the second, one more under the first.
    for value in (first, first, second, first):
        token = variable.set(value)
        outs.append(checkpoint(function, x, use_reentrant=False))
        variable.reset(token)
    for out in outs:
        out.sum().backward()
    assert seen == [first, first, second, first] * 2
    known = weakref.ref(first)
    outs.clear()
    seen.clear()
    del first, second, value, out, token
    gc.collect()
    assert known() is None


def test_a_thread_has_the_variables_for_the_replay_alone() -> None:
    seen: list[float] = []

    def function(x: Tensor) -> Tensor:
        seen.append(VARIABLE.get())
        VARIABLE.set(VARIABLE.get() + 1)
        return torch.tanh(x)

    def forward() -> Tensor:
        VARIABLE.set(3.0)
        return checkpoint(function, leaf(4), use_reentrant=False)

    out = contextvars.copy_context().run(forward)

    def backward() -> None:
        out.sum().backward()
        seen.append(VARIABLE.get())

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert seen == [3.0, 3.0, 1.0]
    assert VARIABLE.get() == 1.0


def test_a_context_that_a_replay_enters_and_does_not_leave_is_let_alone() -> None:
    entered: list[contextvars.Context] = []

    def enter(context: contextvars.Context) -> None:
        assert ctypes.pythonapi.PyContext_Enter(ctypes.py_object(context)) == 0
        entered.append(context)

    def leave() -> None:
        assert ctypes.pythonapi.PyContext_Exit(ctypes.py_object(entered.pop())) == 0

    other = contextvars.copy_context()
    other.run(VARIABLE.set, 7.0)
    seen: list[float] = []

    def function(x: Tensor) -> Tensor:
        seen.append(VARIABLE.get())
        if is_recomputing():
            enter(other)
        return torch.tanh(x)

    def all_of_it() -> tuple[float, float]:
        VARIABLE.set(3.0)
        out = checkpoint(function, leaf(4), use_reentrant=False)
        VARIABLE.set(4.0)
        out.sum().backward()
        inside = VARIABLE.get()
        leave()
        return inside, VARIABLE.get()

    assert contextvars.copy_context().run(all_of_it) == (7.0, 4.0)
    assert seen == [3.0, 3.0]
    assert other[VARIABLE] == 7.0


def test_an_error_in_a_replay_leaves_the_variables_as_they_were() -> None:
    def function(x: Tensor) -> Tensor:
        if is_recomputing():
            VARIABLE.set(5.0)
            raise KeyError("in the replay")
        return torch.tanh(x)

    out = checkpoint(function, leaf(4), use_reentrant=False)
    token = VARIABLE.set(2.0)
    with pytest.raises(KeyError, match="in the replay"):
        out.sum().backward()
    assert VARIABLE.get() == 2.0
    VARIABLE.reset(token)


# Casts that autocast has cached, by dtype and around a backward.
BACKWARD_INSIDE: dict[str, Callable[[], Any]] = {
    "nothing": nullcontext,
    "bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "half": lambda: torch.autocast("cpu", torch.half),
    "disabled": lambda: torch.autocast("cpu", enabled=False),
}


@both_forms
@pytest.mark.parametrize("inside", BACKWARD_INSIDE)
def test_casts_of_one_replay_are_not_those_of_another(inside: str, use_reentrant: bool) -> None:
    """Segments that cast one weight to several dtypes, and a backward in a context of autocast."""

    def program(run: Run) -> Any:
        x, weight = leaf(4, 4), leaf(4, 4)

        def multiplied(t: Tensor) -> Tensor:
            return (t @ weight).sin()

        def in_both(t: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.half):
                t = multiplied(t)
            with torch.autocast("cpu", torch.bfloat16):
                return multiplied(t)

        with torch.autocast("cpu", torch.bfloat16):
            outs = [run(multiplied, x)]
        with torch.autocast("cpu", torch.half):
            outs += [run(multiplied, x)]
        outs += [run(multiplied, x), run(in_both, x)]
        with BACKWARD_INSIDE[inside]():
            x @ weight  # fills the cache
            torch.autograd.backward([out.float().sum() for out in outs])
        return outs, grads([x, weight])

    assert_exact(program, use_reentrant=use_reentrant, replays=4)


@pytest.mark.parametrize("mode", [doubled_tanh, halved_tanh])
def test_a_mode_that_the_function_entered_is_entered_once_in_a_replay_for_its_own_backward(
    mode: Callable[[], Any],
) -> None:
    def program(run: Run) -> Any:
        x, weight = leaf(3, 3), leaf(3, 3)

        def penalised(t: Tensor) -> Tensor:
            inner = t.detach().requires_grad_()
            with mode():
                (grad,) = torch.autograd.grad(torch.tanh(inner @ weight).exp().sum(), inner)
            return torch.tanh(t @ weight).exp() + grad

        out = run(penalised, x)
        out.sum().backward()
        return out, grads([x, weight])

    assert_exact(program)


def test_a_backward_inside_of_the_function_leaves_the_casts_that_its_context_has_made() -> None:
    def program(run: Run) -> Any:
        x, weight = leaf(4, 4), leaf(4, 4)

        def twice(t: Tensor) -> Tensor:
            inner = t.detach().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                t = (t @ weight).sin()
                (grad,) = torch.autograd.grad((inner @ weight).exp().sum(), inner)
                return (t @ weight).sin() + grad

        out = run(twice, x)
        out.float().sum().backward()
        return out, grads([x, weight])

    assert_exact(program)


def test_a_replay_leaves_casts_also_where_its_forward_did_without_a_cache() -> None:
    def program(run: Run) -> Any:
        x, weight = leaf(4, 4), leaf(4, 4)
        with torch.autocast("cpu", torch.bfloat16):
            out = (x @ weight).sin()
            start = x.detach().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                inner = run(torch.sin, start)
            (grad,) = torch.autograd.grad(inner.sum(), start)
            out = (out @ weight).sin() + grad
        out.float().sum().backward()
        return out, grads([x, weight])

    assert_exact(program)

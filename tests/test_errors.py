"""Errors: bad input, functions that raise, replays that do something else than the forward."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import (
    Changing,
    Run,
    assert_exact,
    both_forms,
    checkpointed,
    grads,
    leaf,
    line_of,
    message_of,
    plain,
    top_hooks,
)
from torch import Tensor
from torch.nn.functional import dropout
from torch.utils import checkpoint as upstream

import torch_reprise
from torch_reprise import (
    Checkpointer,
    CheckpointError,
    checkpoint,
    ledger,
    set_checkpoint_early_stop,
)

# Bad input. `x` requires grad in all of these: nothing depends on what the call is for.


@pytest.mark.parametrize("function", [3, "sin", torch.ones(2)], ids=["int", "str", "Tensor"])
def test_a_function_that_is_not_callable(function: Any) -> None:
    with pytest.raises(TypeError, match=f"function.*callable.*{type(function).__name__}"):
        checkpoint(function, leaf(2), use_reentrant=False)
    with pytest.raises(TypeError, match=f"function.*callable.*{type(function).__name__}"):
        checkpoint(function, leaf(2), use_reentrant=True)
    with pytest.raises(TypeError, match=f"callable.*{type(function).__name__}"):
        Checkpointer()(function, leaf(2))


@pytest.mark.parametrize("value", [0, 1, "yes", torch.tensor(True)], ids=repr)
def test_use_reentrant_of_the_wrong_type(value: Any) -> None:
    kind = type(value).__name__
    with pytest.raises(TypeError, match=f"use_reentrant must be True.*{kind}"):
        checkpoint(torch.sin, leaf(2), use_reentrant=value)
    with pytest.raises(TypeError, match=f"use_reentrant must be True.*{kind}"):
        Checkpointer(use_reentrant=value)


@pytest.mark.parametrize("name", ["preserve_rng_state", "early_stop", "debug"])
@pytest.mark.parametrize("value", [None, 0, "yes"], ids=repr)
def test_options_that_must_be_bool(name: str, value: Any) -> None:
    kind = type(value).__name__
    with pytest.raises(TypeError, match=f"{name} must be True.*{kind}"):
        checkpoint(torch.sin, leaf(2), use_reentrant=False, **{name: value})
    with pytest.raises(TypeError, match=f"{name} must be True.*{kind}"):
        Checkpointer(**{name: value})


def test_options_that_may_be_none_but_not_anything() -> None:
    with pytest.raises(TypeError, match=r"respect_saved_tensors_hooks must be True.*int"):
        checkpoint(torch.sin, leaf(2), use_reentrant=False, respect_saved_tensors_hooks=1)
    with pytest.raises(TypeError, match=r"use_reentrant must be True or False.*NoneType"):
        Checkpointer(use_reentrant=None)
    with pytest.raises(TypeError, match=r"enable must be True or False.*NoneType"):
        set_checkpoint_early_stop(None)


def test_generators_that_nobody_would_look_at() -> None:
    with pytest.raises(ValueError, match="generators are replayed with preserve_rng_state=True"):
        Checkpointer(generators=[torch.Generator()], preserve_rng_state=False)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"limit": -1}, ValueError, "limit must not be negative, got -1"),
        ({"limit": "all"}, TypeError, "limit must be an int or None, got str"),
        ({"limit": True}, TypeError, "limit must be an int or None, got bool"),
        ({"events": 3}, TypeError, "events must be True or False, got int"),
    ],
    ids=repr,
)
def test_what_a_recording_cannot_be_asked_for(
    given: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message), torch_reprise.ledger.record(**given):
        pass


def test_states_that_are_no_tensors() -> None:
    with pytest.raises(TypeError, match=r"states\['cpu'\] must be a byte tensor, got NoneType"):
        torch_reprise.rng.RngSnapshot.from_state_tensors({"cpu": None})  # type: ignore[dict-item]


def test_an_ambient_policy_of_another_type() -> None:
    with pytest.raises(ValueError, match=r"ambient must be one of .*got \['restore'\]"):
        Checkpointer(ambient=["restore"])  # type: ignore[arg-type]


def test_preserve_rng_state_of_the_wrong_type_in_the_reentrant_form() -> None:
    with pytest.raises(TypeError, match=r"preserve_rng_state must be True.*int"):
        checkpoint(torch.sin, leaf(2), use_reentrant=True, preserve_rng_state=1)  # type: ignore


@pytest.mark.parametrize("value", ["values", "", None, True], ids=repr)
def test_determinism_check_of_an_unknown_value(value: Any) -> None:
    with pytest.raises(ValueError, match=r"(?s)determinism_check.*(default.*none|none.*default)"):
        checkpoint(torch.sin, leaf(2), use_reentrant=False, determinism_check=value)
    with pytest.raises(ValueError, match=re.escape(repr(value))):
        Checkpointer(determinism_check=value)


def test_unknown_options_of_a_checkpointer() -> None:
    with pytest.raises(TypeError, match="earlystop"):
        Checkpointer(earlystop=True)  # type: ignore[call-arg]


def test_an_unknown_keyword_belongs_to_the_function() -> None:
    with pytest.raises((TypeError, ValueError), match="earlystop"):
        checkpoint(use_reentrant=False, earlystop=True)  # and there is no function
    with pytest.raises(TypeError, match="earlystop"):
        checkpoint(lambda x: x, leaf(2), use_reentrant=False, earlystop=True)


@pytest.mark.parametrize("context_fn", [None, 3, contextlib.nullcontext()], ids=type)
def test_a_context_fn_that_is_not_callable(context_fn: Any) -> None:
    with pytest.raises(TypeError, match=f"context_fn.*callable.*{type(context_fn).__name__}"):
        checkpoint(torch.sin, leaf(2), use_reentrant=False, context_fn=context_fn)


@pytest.mark.parametrize(
    "returned",
    [
        None,
        contextlib.nullcontext(),
        (contextlib.nullcontext(),),
        (contextlib.nullcontext(),) * 3,
        (contextlib.nullcontext(), 3),
        (torch.no_grad, contextlib.nullcontext()),
    ],
    ids=["None", "one", "tuple of one", "three", "an int", "a class"],
)
def test_a_context_fn_that_does_not_return_two_contexts(returned: Any) -> None:
    function = Changing(torch.sin, torch.sin)
    with pytest.raises(TypeError, match=r"(?s)context_fn.*two context managers"):
        checkpoint(function, leaf(2), use_reentrant=False, context_fn=lambda: returned)
    assert function.calls == 0, "found before anything ran"


def test_a_context_that_suppresses_an_error_of_the_forward() -> None:
    def context_fn() -> Any:
        return contextlib.suppress(KeyError), contextlib.nullcontext()

    def broken(x: Tensor) -> Tensor:
        raise KeyError("forward")

    with pytest.raises(RuntimeError, match=r"context_fn suppressed an exception"):
        checkpoint(broken, leaf(2), use_reentrant=False, context_fn=context_fn)
    assert top_hooks() is None


@pytest.mark.parametrize(
    "options",
    [{"debug": True}, {"context_fn": lambda: None}, {"respect_saved_tensors_hooks": True}],
    ids=["debug", "context_fn", "respect_saved_tensors_hooks"],
)
def test_options_that_the_reentrant_form_does_not_have(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}.*use_reentrant=False"):
        checkpoint(torch.sin, leaf(2), use_reentrant=True, **options)
    with pytest.raises(ValueError, match=f"{next(iter(options))}.*use_reentrant=False"):
        Checkpointer(use_reentrant=True, **options)


def test_our_error_is_one_of_torchs() -> None:
    assert issubclass(CheckpointError, upstream.CheckpointError)
    assert issubclass(CheckpointError, RuntimeError)


# Functions that raise.


class Everything:
    """What an exception has to leave as it was."""

    def __init__(self) -> None:
        self.values = (
            torch.is_grad_enabled(),
            top_hooks(),
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.get_default_dtype(),
            torch.get_rng_state().numpy().tobytes(),
            ledger.live_segments(),
            ledger.live_slots(),
            ledger.stashed_bytes(),
        )


def messy(x: Tensor) -> Tensor:
    """Draws and saves a little, then raises from within all that a replay has to unwind."""
    dropout(x, 0.5)
    with (
        torch.no_grad(),
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    ):
        raise KeyError("on purpose")


@pytest.mark.parametrize("autocast", [False, True])
@both_forms
def test_an_error_in_the_forward_leaves_nothing_behind(use_reentrant: bool, autocast: bool) -> None:
    call = checkpointed(use_reentrant=use_reentrant)
    x = leaf(8)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        state = torch.get_rng_state()
        message_of(KeyError, lambda: plain(messy, x))
        plainly = torch.get_rng_state()
        torch.set_rng_state(state)
        before = Everything()
        message_of(KeyError, lambda: call(messy, x))
        assert torch.equal(torch.get_rng_state(), plainly), "as far as the plain call drew"
        torch.set_rng_state(state)
        assert Everything().values == before.values


@pytest.mark.parametrize("autocast", [False, True])
@both_forms
def test_an_error_in_the_replay_leaves_nothing_behind(use_reentrant: bool, autocast: bool) -> None:
    call = checkpointed(use_reentrant=use_reentrant)
    x = leaf(8)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = call(Changing(lambda t: dropout(t.sin(), 0.5).exp(), messy), x)
    torch.rand(5)
    before = Everything()
    assert "on purpose" in message_of(KeyError, lambda: out.sum().backward())
    assert Everything().values == before.values
    assert x.grad is None


@pytest.mark.parametrize("where", ["forward", "replay"])
@both_forms
def test_the_step_after_an_error_is_exact(use_reentrant: bool, where: str) -> None:
    def program(run: Run) -> Any:
        x, y = leaf(8), leaf(8)
        if run is not plain:
            state = torch.get_rng_state()
            if where == "forward":
                message_of(KeyError, lambda: run(messy, x))
            else:
                out = run(Changing(lambda t: t.sin().exp(), messy), x)
                message_of(KeyError, lambda: out.sum().backward())
            torch.set_rng_state(state)
        out = run(lambda t: dropout(t.sin(), 0.5).exp(), y)
        out.sum().backward()
        return out, grads([x, y])

    replays = 1 if where == "forward" else 2
    assert_exact(program, replays=replays, use_reentrant=use_reentrant)


def test_an_error_in_a_nested_replay_leaves_nothing_behind() -> None:
    # Two good calls: the forward, and the forward inside the replay of the outer segment.
    inner = Changing(lambda t: dropout(t.sin(), 0.5).exp(), messy, times=2)
    x = leaf(8)
    out = checkpoint(
        lambda t: checkpoint(inner, t.exp(), use_reentrant=False).tanh(), x, use_reentrant=False
    )
    before = Everything()
    message_of(KeyError, lambda: out.sum().backward(retain_graph=True))
    assert Everything().values == before.values


def test_a_replay_may_succeed_after_one_that_raised() -> None:
    x = leaf(4)
    function = Changing(lambda t: t.sin().exp(), messy)
    out = checkpoint(function, x, use_reentrant=False)
    message_of(KeyError, lambda: out.sum().backward(retain_graph=True))
    function.later = function.first
    (found,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(found, torch.autograd.grad(x.sin().exp().sum(), x)[0])


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_errors_that_are_no_exceptions_come_through(error: type[BaseException]) -> None:
    def interrupted(x: Tensor) -> Tensor:
        raise error("stop")

    x = leaf(4)
    out = checkpoint(Changing(lambda t: t.sin().exp(), interrupted), x, use_reentrant=False)
    before = Everything()
    message_of(error, lambda: out.sum().backward())
    message_of(error, lambda: checkpoint(interrupted, x, use_reentrant=False))
    assert Everything().values == before.values


# Replays that save something else.


def first(x: Tensor) -> Tensor:
    h = torch.sin(x)
    h = torch.exp(h)
    return torch.tanh(h)


def other_shape(x: Tensor) -> Tensor:
    h = torch.sin(x)
    h = torch.exp(h[:2])
    return torch.tanh(h)


def other_dtype(x: Tensor) -> Tensor:
    h = torch.sin(x)
    h = torch.exp(h.double())
    return torch.tanh(h)


def one_less(x: Tensor) -> Tensor:
    h = torch.sin(x)
    return torch.exp(h)


def one_more(x: Tensor) -> Tensor:
    return torch.cos(first(x))


@contextlib.contextmanager
def mismatch(later: Callable[..., Any], **options: Any) -> Iterator[Tensor]:
    """The output of a segment that runs `first` and will be replayed with `later`."""
    x = leaf(4)
    state = torch.get_rng_state()
    yield checkpoint(Changing(first, later), x, use_reentrant=False, **options)
    assert x.grad is None and top_hooks() is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("later", "found"),
    [(other_shape, r"float32 \[2\] on cpu"), (other_dtype, r"float64 \[4\] on cpu")],
    ids=["shape", "dtype"],
)
@pytest.mark.parametrize("early_stop", [True, False])
def test_other_tensors(later: Any, found: str, early_stop: bool) -> None:
    with mismatch(later, early_stop=early_stop) as out:
        text = message_of(CheckpointError, lambda: out.sum().backward())
    # sin saves its input, exp and tanh their results: positions 0, 1 and 2.
    for position, part in ((1, "torch.exp"), (2, "torch.tanh")):
        where = re.escape(line_of(first, part))
        assert re.search(
            rf"(?s)position {position}\b.*{where} in first\s+"
            rf"expected:\s+float32 \[4\] on cpu\s+found:\s+{found}",
            text,
        ), text
    assert "position 0" not in text, "what matches is not listed"
    assert "TanhBackward0" in text, "the node that asked"


def test_fewer_tensors() -> None:
    with mismatch(one_less) as out:
        text = message_of(CheckpointError, lambda: out.sum().backward())
    assert re.search(r"(?s)fewer tensors.*expected:\s+3 .*found:\s+2\b.*position 2\b", text), text
    assert f"{line_of(first, 'torch.tanh')} in first" in text
    assert "float32 [4] on cpu" in text and "TanhBackward0" in text


def test_more_tensors() -> None:
    with mismatch(one_more, early_stop=False) as out:
        text = message_of(CheckpointError, lambda: out.sum().backward())
    assert re.search(r"(?s)more tensors.*expected:\s+3 ", text), text
    assert line_of(one_more, "torch.cos") in text and "TanhBackward0" in text


def test_a_message_names_the_segment_and_what_to_do() -> None:
    with mismatch(other_shape) as out:
        text = message_of(upstream.CheckpointError, lambda: out.sum().backward())
    assert "Changing" in text and "set_checkpoint_debug_enabled" in text


def test_an_error_that_the_function_swallows_is_raised_all_the_same() -> None:
    def later(x: Tensor) -> Tensor:
        try:
            return one_more(x)
        except BaseException:
            return x

    with mismatch(later, early_stop=False) as out:
        assert "more tensors" in message_of(CheckpointError, lambda: out.sum().backward())


def test_without_a_determinism_check_other_metadata_passes() -> None:
    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, kept: Tensor) -> Tensor:
            ctx.save_for_backward(kept)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            (kept,) = ctx.saved_tensors
            return grad * kept.sum(), None

    def saving(count: int) -> Callable[[Tensor], Tensor]:
        return lambda x: Sum.apply(x, torch.ones(count))

    x = leaf(3)
    strict = checkpoint(Changing(saving(5), saving(2)), x, use_reentrant=False)
    with pytest.raises(CheckpointError, match=r"float32 \[5\]"):
        strict.sum().backward()
    lax = checkpoint(
        Changing(saving(5), saving(2)), x, use_reentrant=False, determinism_check="none"
    )
    lax.sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))

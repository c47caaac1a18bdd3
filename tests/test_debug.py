"""debug=True and set_checkpoint_debug_enabled: the log of operators; and torch's anomaly mode."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import pytest
import torch
from helpers import Changing, Run, assert_exact, grads, leaf, line_of, message_of
from torch import Tensor
from torch.nn.functional import dropout

from torch_reprise import (
    CheckpointError,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_debug_enabled,
)


def forward_operations(x: Tensor) -> Tensor:
    h = torch.sin(x)
    h = torch.exp(h)
    return torch.tanh(h)


def replay_operations(x: Tensor) -> Tensor:
    h = torch.sin(x)
    h = torch.cosh(h)
    return torch.tanh(h[:2])


def message(enabled: Any = "unset", **options: Any) -> str:
    """The error of a segment whose replay runs other operators, with these debug settings."""
    x = leaf(4)
    with contextlib.nullcontext() if enabled == "unset" else set_checkpoint_debug_enabled(enabled):
        out = checkpoint(
            Changing(forward_operations, replay_operations), x, use_reentrant=False, **options
        )
    return message_of(CheckpointError, lambda: out.sum().backward())


def has_log(text: str) -> bool:
    """Whether the operators of the two runs are listed: cosh is nowhere else in the message."""
    return "aten" in text and "cosh" in text


def test_the_log_lists_the_operators_of_both_runs() -> None:
    text = message(debug=True)
    for name in ("sin", "exp", "tanh", "cosh", "slice"):
        assert re.search(rf"aten\W+{name}\b", text), f"{name} is missing in:\n{text}"


def test_the_log_marks_the_first_divergence() -> None:
    text = message(debug=True)
    assert "differ at operator 1" in text
    marked = [line for line in text.splitlines() if "-->" in line]
    assert len(marked) == 2, text
    assert "aten.exp" in marked[0]
    assert "aten.cosh" in marked[1]
    assert f"{line_of(forward_operations, 'torch.exp')} in forward_operations" in text
    assert f"{line_of(replay_operations, 'torch.cosh')} in replay_operations" in text


def test_the_message_of_the_mismatch_stays() -> None:
    bare, full = message(), message(debug=True)
    assert not has_log(bare) and has_log(full)
    for part in ("position 2", "float32 [4] on cpu", "float32 [2] on cpu", "TanhBackward0"):
        assert part in bare and part in full


@pytest.mark.parametrize(
    ("enabled", "debug", "expected"),
    [
        ("unset", False, False),
        ("unset", True, True),
        (True, False, True),
        (True, True, True),
        (False, True, False),
        (False, False, False),
        (None, True, True),
        (None, False, False),
    ],
)
def test_the_context_manager_overrides_the_option(
    enabled: Any, debug: bool, expected: bool
) -> None:
    assert has_log(message(enabled, debug=debug)) == expected


def test_the_context_manager_nests_and_restores() -> None:
    with set_checkpoint_debug_enabled(True):
        with pytest.raises(KeyError), set_checkpoint_debug_enabled(False):
            assert not has_log(message())
            raise KeyError("leave")
        assert has_log(message())
        with set_checkpoint_debug_enabled(None):
            assert not has_log(message())
    assert not has_log(message())


def test_the_context_manager_refuses_other_values() -> None:
    with (
        pytest.raises(TypeError, match=r"True, False or None, got int"),
        set_checkpoint_debug_enabled(1),
    ):
        pass


def test_debug_alone_changes_nothing() -> None:
    def program(run: Run) -> Any:
        x, w = leaf(4, 4), leaf(4, 4)

        def inner(h: Tensor) -> Tensor:
            return dropout(h, 0.5).sigmoid()

        out = run(lambda a, b: run(inner, torch.tanh(a @ b)) * b, x, w)
        out.sum().backward(retain_graph=True)
        out.sin().sum().backward()
        return out, grads([x, w])

    assert_exact(program, replays=4, debug=True)
    assert_exact(program, replays=4, debug=True, early_stop=False)


def test_debug_works_together_with_context_fn() -> None:
    def two_contexts() -> Any:
        return contextlib.nullcontext(), contextlib.nullcontext()

    def context_fn() -> Any:
        return create_selective_checkpoint_contexts([torch.ops.aten.sin.default])

    assert has_log(message(debug=True, context_fn=two_contexts))

    def program(run: Run) -> Any:
        x = leaf(4)
        out = run(forward_operations, x)
        out.sum().backward()
        return out, grads([x])

    assert_exact(program, replays=1, debug=True, context_fn=context_fn)


def test_a_replay_with_fewer_and_with_more_operators() -> None:
    x = leaf(4)
    fewer = checkpoint(
        Changing(forward_operations, lambda t: t.sin()), x, use_reentrant=False, debug=True
    )
    text = message_of(CheckpointError, lambda: fewer.sum().backward())
    assert "fewer tensors" in text and has_log(text.replace("tanh", "cosh"))
    more = checkpoint(
        Changing(forward_operations, lambda t: forward_operations(t).cosh()),
        x,
        use_reentrant=False,
        debug=True,
        early_stop=False,
    )
    text = message_of(CheckpointError, lambda: more.sum().backward())
    # cosh saves its input before it runs, so the replay ends before the log has it.
    assert "more tensors" in text and "aten.tanh" in text and "one run ends there" in text


# Anomaly mode.


def mixed(x: Tensor, w: Tensor) -> Tensor:
    return dropout(torch.tanh(x @ w), 0.4).exp() * w


def test_anomaly_mode() -> None:
    def program(run: Run) -> Any:
        x, w = leaf(4, 4), leaf(4, 4)
        with torch.autograd.set_detect_anomaly(True):
            out = run(mixed, run(mixed, x, w), w)
            out.sum().backward()
        return out, grads([x, w])

    assert_exact(program, replays=2)


def test_anomaly_mode_finds_a_nan_inside() -> None:
    x = torch.zeros(2, requires_grad=True)
    with torch.autograd.set_detect_anomaly(True):
        out = checkpoint(lambda t: (t.sin().sqrt() * 0.0).exp(), x, use_reentrant=False)
        with pytest.warns(UserWarning, match="Error detected in SqrtBackward0"):
            text = message_of(RuntimeError, lambda: out.sum().backward())
    assert "'SqrtBackward0' returned nan values" in text


def test_anomaly_mode_and_an_error_in_the_replay() -> None:
    def broken(x: Tensor) -> Tensor:
        raise KeyError("the second time")

    x = leaf(3)
    with torch.autograd.set_detect_anomaly(True):
        out = checkpoint(Changing(lambda t: t.sin().exp(), broken), x, use_reentrant=False)
        with pytest.warns(UserWarning, match="Error detected in ExpBackward0"):
            assert "the second time" in message_of(KeyError, lambda: out.sum().backward())


@pytest.mark.filterwarnings("ignore:.*nested:UserWarning")
def test_the_log_has_nested_tensors() -> None:
    """They have no shape; an error inside of the log would end the process."""
    x = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], requires_grad=True)
    y = checkpoint(lambda x: x * x, x, use_reentrant=False, debug=True)
    assert all(map(torch.equal, y.unbind(), (x * x).unbind()))


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr")
@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:DeprecationWarning")
def test_debug_is_off_under_a_tracer() -> None:
    def fn(x: Tensor) -> Tensor:
        result: Tensor = checkpoint(lambda x: x.sin().exp(), x, use_reentrant=False, debug=True)
        return result

    x = torch.arange(3.0)
    out, slope = torch.func.linearize(fn, x)
    assert torch.equal(out, x.sin().exp())
    assert torch.equal(slope(torch.ones(3)), x.sin().exp() * x.cos())

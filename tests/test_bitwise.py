"""`determinism_check="bitwise"`: other values in a replay are an error that says where."""

from __future__ import annotations

import re
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
    message_of,
)
from torch import Tensor, nn
from torch.nn.functional import rrelu

from torch_reprise import CheckpointError, checkpoint


class Drifting(nn.Module):
    """Multiplies by a factor that changes from call to call, and nobody sees why."""

    def __init__(self, step: float) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.calls = 0
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(self.fc(x) * (1 + self.step * self.calls))


class Block(nn.Module):
    def __init__(self, step: float) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.second = Drifting(step)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.second(self.first(x)))


def bitwise(**options: Any) -> Run:
    return checkpointed(determinism_check="bitwise", **options)


@both_forms
def test_other_values_are_an_error(use_reentrant: bool) -> None:
    block, x = Block(1e-3), leaf(2, 4)
    out = bitwise(use_reentrant=use_reentrant)(block, x)
    text = message_of(CheckpointError, lambda: out.sum().backward())
    assert 'computes other values than its forward did (determinism_check="bitwise"' in text
    assert "Block" in text
    checkpoint(block, x, use_reentrant=use_reentrant).sum().backward()  # silent by default


def test_the_message_says_where() -> None:
    block = Block(1e-3)
    bitwise()(block.first, leaf(2, 4)).sum().backward()  # one that is equal
    out = bitwise()(block, leaf(2, 4))
    text = message_of(CheckpointError, lambda: out.sum().backward())
    assert re.search(r"[1-9]\d* replays? (was|were) equal before", text)
    assert re.search(r"position \d+, saved at .*test_bitwise.py:\d+ in forward", text)
    assert "in Block.second (Drifting)" in text
    assert "expected: float32 [2, 4] on cpu with the bits of the forward" in text
    assert "first" not in text, "what was computed before the difference is equal"


@both_forms
@pytest.mark.parametrize("training", [True, False])
def test_equal_values_are_no_error(training: bool, use_reentrant: bool) -> None:
    def program(run: Run) -> Any:
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), Block(0.0))
        model.train(training)
        x = leaf(6, 4)
        out = run(model, x)
        out.square().sum().backward()
        return out, grads([x]), grads(model), list(model.buffers())

    assert_exact(program, use_reentrant=use_reentrant, determinism_check="bitwise")


def test_a_tensor_that_is_filled_after_it_was_saved() -> None:
    def program(run: Run) -> Any:
        x = leaf(300, 200)
        out = run(lambda x: rrelu(rrelu(x, training=True) * 2, training=True), x)
        out.square().sum().backward()
        return out, grads([x])

    assert_exact(program, determinism_check="bitwise")


def test_the_sign_of_zero_and_the_payload_of_nan_count() -> None:
    for first, later in ((0.0, -0.0), (float("nan"), -float("nan"))):
        function = Changing(
            lambda x, value=first: torch.exp(x * torch.full((3,), value)),
            lambda x, value=later: torch.exp(x * torch.full((3,), value)),
        )
        out = bitwise()(function, leaf(3))
        message_of(CheckpointError, lambda out=out: out.sum().backward())


def test_jagged_and_sparse_tensors() -> None:
    def program(run: Run) -> Any:
        x = leaf(3, 3)
        sparse = torch.eye(3).to_sparse()
        jagged = torch.nested.nested_tensor(
            [torch.randn(2, 3), torch.randn(4, 3)], layout=torch.jagged
        )
        out = run(lambda x: torch.sparse.mm(sparse, torch.tanh(x)).sin(), x)
        also = run(lambda x: (jagged @ torch.tanh(x)).sin().values(), x)
        (out.sum() + also.sum()).backward()
        return out, also, grads([x])

    assert_exact(program, determinism_check="bitwise")


def test_shapes_are_still_compared() -> None:
    function = Changing(lambda x: torch.exp(x), lambda x: torch.exp(x[:2]))
    out = bitwise()(function, leaf(3))
    assert "saves other tensors" in message_of(CheckpointError, lambda: out.sum().backward())


def test_other_values_in_a_jagged_tensor() -> None:
    parts = [torch.randn(2, 3), torch.randn(4, 3)]
    jagged = torch.nested.nested_tensor(parts, layout=torch.jagged)

    def times(factor: float) -> Any:
        return lambda x: (jagged * factor * torch.tanh(x)).sin().values()

    out = bitwise()(Changing(times(1.0), times(1.5)), leaf(1, 3))
    text = message_of(CheckpointError, lambda: out.sum().backward())
    assert "computes other values" in text and "symbolic" in text
    bitwise()(times(1.0), leaf(1, 3)).sum().backward()

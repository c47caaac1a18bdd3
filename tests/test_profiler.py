"""What profilers see of a replay: a range that tools know, and the segment's name."""

from __future__ import annotations

import pytest
import torch
from helpers import both_forms, checkpointed, leaf
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with record_function("in the block"):
            return self.linear(x).tanh()


def ranges(run: profile, name: str) -> list[tuple[float, float]]:
    events = run.events()
    assert events is not None
    found = [e for e in events if e.name == name]
    return sorted((e.time_range.start, e.time_range.end) for e in found)


@both_forms
def test_each_replay_is_a_range_of_the_name_that_tools_look_for(use_reentrant: bool) -> None:
    blocks = [Block(), Block()]
    x = leaf(4, 8)
    with profile(activities=[ProfilerActivity.CPU]) as run:
        with record_function("forward"):
            out: Tensor = x
            for block in blocks:
                out = checkpointed(use_reentrant=use_reentrant)(block, out)
        with record_function("backward"):
            out.sum().backward()
    replays = ranges(run, "recompute_fn")
    named = ranges(run, "torch_reprise.checkpoint: Block")
    inside = ranges(run, "in the block")
    assert len(replays) == len(named) == 2
    assert len(inside) == 4, "two in the forward, two in replays"
    (begin, end), *_ = ranges(run, "backward")
    for outer, inner, function in zip(replays, named, inside[2:], strict=True):
        assert begin <= outer[0] <= inner[0] <= function[0]
        assert function[1] <= inner[1] <= outer[1] <= end


def test_a_nested_replay_is_a_range_inside_of_the_outer_one_s_backward() -> None:
    inner, outer = Block(), Block()

    def both(x: Tensor) -> Tensor:
        return checkpointed(use_reentrant=False)(inner, x).sin() + outer(x)

    out = checkpointed(use_reentrant=False)(both, leaf(4, 8))
    with profile(activities=[ProfilerActivity.CPU]) as run:
        out.sum().backward()
    names = [e.name for e in run.events() or () if e.name.startswith("torch_reprise.checkpoint")]
    ours = "test_a_nested_replay_is_a_range_inside_of_the_outer_one_s_backward.<locals>.both"
    assert sorted(names) == [
        "torch_reprise.checkpoint: Block",
        f"torch_reprise.checkpoint: {ours}",
    ]


def test_an_error_in_a_replay_ends_its_ranges() -> None:
    calls = []

    def fickle(x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise KeyError("mine")
        return x.tanh()

    out = checkpointed(use_reentrant=False)(fickle, leaf(8))
    with profile(activities=[ProfilerActivity.CPU]) as run:
        with pytest.raises(KeyError, match="mine"):
            out.sum().backward()
        with record_function("after"):
            torch.ones(2).sin()
    (begin, end), *_ = ranges(run, "recompute_fn")
    (after, _), *_ = ranges(run, "after")
    assert begin <= end <= after

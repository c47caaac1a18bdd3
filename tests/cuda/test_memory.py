"""Bytes that the device's allocator counts, beside those of torch's own form."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from helpers import both_forms, checkpointed, plain
from torch import Tensor
from torch.nn import functional as F

from torch_reprise import checkpoint, ledger
from torch_reprise._demo.model import GPT, GPTConfig

pytestmark = pytest.mark.cuda


def bytes_of_step(model: GPT, run: Callable[..., Any], tokens: Tensor) -> tuple[int, int, int]:
    """Held when backward begins, most at any moment, and left behind; over the start's."""
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = model.loss(model.run_blocks(model.embed(tokens[0]), run), tokens[1])
    held = torch.cuda.memory_allocated() - start
    loss.backward()
    del loss
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - start
    model.zero_grad(set_to_none=True)
    return held, peak, torch.cuda.memory_allocated() - start


@both_forms
def test_no_more_than_torch(use_reentrant: bool) -> None:
    model = GPT(GPTConfig(6, 256, 4, 128, 96, 0.1)).cuda()
    tokens = torch.randint(96, (2, 8, 128)).cuda()
    torchs = partial(torch.utils.checkpoint.checkpoint, use_reentrant=use_reentrant)
    runs = {"plain": plain, "torch": torchs, "ours": checkpointed(use_reentrant=use_reentrant)}
    for run in runs.values():
        bytes_of_step(model, run, tokens)  # workspaces of libraries are allocated once
    found = {name: bytes_of_step(model, run, tokens) for name, run in runs.items()}
    assert found["ours"][0] <= found["torch"][0] < found["plain"][0] / 4
    assert found["ours"][1] <= found["torch"][1] < found["plain"][1]
    assert {left for _, _, left in found.values()} == {0}


def test_a_recomputed_tensor_is_freed_at_its_unpack() -> None:
    """A chain of tensors of a MiB each: backward needs one at a time, and its gradient."""
    x = torch.randn(1 << 18, device="cuda", requires_grad=True)

    def chain(t: Tensor) -> Tensor:
        for _ in range(32):
            t = t.tanh()
        return t

    seen: list[int] = []

    def at_the_last_operator(_: Tensor) -> None:
        seen.append(torch.cuda.memory_allocated())

    x.register_hook(at_the_last_operator)  # type: ignore[no-untyped-call]
    start = torch.cuda.memory_allocated()
    checkpoint(chain, x, use_reentrant=False).sum().backward()
    # Gradients, and what torch has not let go of yet: not the 31 others.
    assert 0 < seen[0] - start <= 5 << 20
    assert ledger.live_slots() == 0


def test_what_a_segment_keeps_is_on_the_host() -> None:
    x = torch.randn(64, device="cuda", requires_grad=True)
    y = F.dropout(x, 0.5)
    torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    outs = [checkpoint(lambda t: F.dropout(t.sin(), 0.5).sum(), x, use_reentrant=False)]
    for _ in range(99):
        outs.append(checkpoint(lambda t: F.dropout(t.sin(), 0.5).sum(), x, use_reentrant=False))
    # An output each: 4 bytes, of which the allocator makes 512.
    assert torch.cuda.memory_allocated() - start == 100 * 512
    assert ledger.stashed_bytes() == 100 * 16
    del outs, y

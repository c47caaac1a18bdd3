"""Many segments with mixed features: memory stays flat, counters come back to zero.

`REPRISE_SOAK=N` runs N segments, not the few that the suite takes time for; `make soak` does.
"""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import pytest
import torch
from helpers import in_threads
from torch import Tensor, nn

from torch_reprise import Checkpointer, GraphExecGroup, checkpoint, ledger

SEGMENTS = int(os.environ.get("REPRISE_SOAK", "4000"))
THREADS = 8


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Mixed:
    """One step of many kinds of segments."""

    SEGMENTS = 9

    def __init__(self) -> None:
        self.model = nn.Sequential(
            nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 8)
        )
        self.generator = torch.Generator().manual_seed(0)
        self.bitwise = Checkpointer(determinism_check="bitwise")
        self.host = Checkpointer(preserve_host_rng=True)

    def inner(self, x: Tensor) -> Tensor:
        return torch.sin(checkpoint(self.model, x, use_reentrant=False))

    def drawing(self, x: Tensor) -> Tensor:
        return x * torch.rand(8, generator=self.generator)

    def failing(self, x: Tensor) -> Tensor:
        out = torch.tanh(x)
        raise ValueError(out.shape)

    def step(self, x: Tensor) -> None:
        x = x.detach().requires_grad_()
        y = checkpoint(self.inner, x, use_reentrant=False)
        y = checkpoint(self.model, y, use_reentrant=True)
        y = checkpoint(self.drawing, y, use_reentrant=False)
        y = self.bitwise(torch.sigmoid, y)
        y = self.host(torch.relu, y)
        with pytest.raises(ValueError):
            checkpoint(self.failing, y, use_reentrant=False)
        with torch.autocast("cpu", torch.bfloat16):
            y = checkpoint(torch.tanh, y, use_reentrant=False)
        loss = y.float().square().sum()
        dropped = checkpoint(self.model, x, use_reentrant=False)
        del dropped
        with GraphExecGroup():
            loss.backward(retain_graph=True)
            loss.backward()


@pytest.mark.needs_gc
def test_memory_stays_flat() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    mixed, x = Mixed(), torch.randn(4, 8)
    steps = max(SEGMENTS // Mixed.SEGMENTS, 100)
    for _ in range(steps // 4):
        mixed.step(x)
    before = resident_bytes()
    for _ in range(steps):
        mixed.step(x)
    grown = resident_bytes() - before
    assert ledger.live_segments() == 0
    assert ledger.live_slots() == 0
    assert ledger.stashed_bytes() == 0
    # A megabyte of the allocator's and the interpreter's own; a leak of 100 bytes per segment is
    # more in the long run.
    assert grown < (1 << 20) + 20 * steps * Mixed.SEGMENTS, f"{grown} bytes in {steps} steps"


@pytest.mark.needs_gc
def test_threads_share_nothing_but_the_process() -> None:
    """Each thread's gradients are those that it gets when it runs alone."""
    steps = max(SEGMENTS // THREADS // 4, 25)
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)) for _ in range(THREADS)]
    inputs = [torch.randn(3, 6) for _ in range(THREADS)]

    def step(index: int, run: bool) -> list[Tensor]:
        model, x = models[index], inputs[index].clone().requires_grad_()
        y = x
        for _ in range(4):
            y = checkpoint(model, y, use_reentrant=False) if run else model(y)
        y.sum().backward()
        assert x.grad is not None
        result = [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
        model.zero_grad()
        return result

    expected = [step(i, False) for i in range(THREADS)]

    def work(index: int) -> None:
        for _ in range(steps):
            for have, want in zip(step(index, True), expected[index], strict=True):
                assert torch.equal(have, want)

    in_threads(THREADS, work, timeout=600.0)
    assert ledger.live_segments() == 0


@pytest.mark.needs_gc
def test_threads_that_ask_for_the_same_segments() -> None:
    """Backward calls of one retained graph from all threads at once."""
    rounds = max(SEGMENTS // THREADS // 100, 5)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    x = torch.randn(3, 6, requires_grad=True)
    y = x
    for _ in range(4):
        y = checkpoint(model, y, use_reentrant=False)
    loss = y.square().sum()
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
    lock, wrong = threading.Lock(), []

    def work(index: int) -> None:
        for _ in range(rounds):
            (found,) = torch.autograd.grad(loss, x, retain_graph=True)
            if not torch.equal(found, expected):
                with lock:
                    wrong.append(index)

    in_threads(THREADS, work, timeout=600.0)
    assert not wrong
    y = loss = x  # the graph is gone
    assert ledger.live_segments() == 0

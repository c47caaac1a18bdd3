"""Training steps captured into a CUDA graph: what each launch computes, bit for bit.

Offsets are held against the plain program in tests/cudasim/test_capture.py; here are the values.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Run, assert_same_bits, both_forms, checkpointed, freeze, plain
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_reprise import ledger
from torch_reprise._demo.model import GPT, GPTConfig

pytestmark = pytest.mark.cuda

LAUNCHES = 4


def captured(run: Run) -> list[Any]:
    """Losses and gradients of launches of one step, and where the generator stands after each."""
    torch.manual_seed(5)
    model = GPT(GPTConfig(2, 64, 1, 32, 48, 0.2)).cuda()
    inputs, targets = torch.randint(48, (2, 2, 32)).cuda()

    def step() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            loss = model.loss(model.run_blocks(model.embed(inputs), run), targets)
        loss.backward()
        return loss.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    found = []
    for _ in range(LAUNCHES):
        inputs.copy_(inputs.roll(1, 1))
        graph.replay()
        found.append(
            [
                loss.clone(),
                [parameter.grad.clone() for parameter in model.parameters()],  # type: ignore[union-attr]
                torch.cuda.get_rng_state(),
            ]
        )
        # Drawn between the launches, which has to show in the next one.
        torch.rand(3, device="cuda")
    return found


@both_forms
def test_launches_of_a_captured_step(use_reentrant: bool) -> None:
    expected = freeze(captured(plain))
    before = ledger.replays()
    found = freeze(captured(checkpointed(use_reentrant=use_reentrant)))
    assert ledger.replays() > before
    assert_same_bits(found, expected)


def test_launches_differ() -> None:
    losses = [launch[0].item() for launch in captured(plain)]
    assert len(set(losses)) == LAUNCHES

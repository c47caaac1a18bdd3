"""Accelerate: a prepared model, accumulated gradients, mixed precision, in one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from architectures import ARCHITECTURES
from comparing import assert_exact, gradients, state
from helpers import both_forms

LLAMA = ARCHITECTURES["llama"]
BATCHES = 6
ACCUMULATE = 2


@pytest.fixture(autouse=True)
def state_of_its_own() -> Iterator[None]:
    """Accelerate keeps its settings in singletons, and does not change the precision of one."""
    yield
    forget()


def forget() -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def train(checkpointing: bool, use_reentrant: bool, precision: str) -> dict[str, Any]:
    forget()
    accelerator = accelerate.Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=ACCUMULATE
    )
    model = LLAMA.build()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    batches = [LLAMA.batch(seed) for seed in range(BATCHES)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None, shuffle=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            steps.append((loss.detach().clone(), gradients(model)))
            optimizer.step()
            optimizer.zero_grad()
    return {"steps": steps, "state": state(model)}


@both_forms
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_prepared_model_is_exact(precision: str, use_reentrant: bool) -> None:
    assert_exact(
        lambda checkpointing: train(checkpointing, use_reentrant, precision),
        replays=BATCHES * LLAMA.segments,
    )


def test_mixed_precision_is_another_program() -> None:
    """Or the test above would be the same one twice."""
    torch.manual_seed(7)
    exact = train(False, False, "no")["steps"][0][0]
    torch.manual_seed(7)
    mixed = train(False, False, "bf16")["steps"][0][0]
    assert not torch.equal(exact, mixed)

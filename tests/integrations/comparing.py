"""Training a few steps plainly, on torch's checkpointing and on ours, and comparing every bit.

A *program* is called with whether to switch checkpointing on. It builds its model, trains it and
returns what is to be compared, as nested containers. `training` makes that of an ordinary loop.
`assert_exact` plays a program without checkpointing and with, on our runtime; `played_on_torch` is
the same on torch's, for the cases in which torch's own is not exact either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from helpers import assert_same_bits, freeze
from torch import Tensor, nn

import torch_reprise
from torch_reprise import ledger

Program = Callable[[bool], Any]
Rows = list[tuple[str, Any, Tensor | None]]

STEPS = 4


def played(program: Program, checkpointing: bool, seed: int = 7) -> Rows:
    """What the program did, and where it left the generator."""
    torch.manual_seed(seed)
    rows = freeze(program(checkpointing))
    return [*rows, ("CPU generator", None, torch.get_rng_state())]


def played_on_torch(program: Program) -> Rows:
    """With torch's checkpointing: nothing may be installed, and nothing of ours replays."""
    before = ledger.segments()
    rows = played(program, True)
    assert ledger.segments() == before, "our runtime took part in torch's run"
    return rows


def played_on_ours(program: Program, replays: int) -> Rows:
    """With our runtime in the place of torch's: that has to make so many replays."""
    before = ledger.replays()
    with torch_reprise.installed():
        rows = played(program, True)
    count = ledger.replays() - before
    assert count == replays, f"{count} replays where {replays} were expected"
    return rows


def assert_exact(program: Program, *, replays: int) -> None:
    plain = played(program, False)
    assert_same_bits(played_on_ours(program, replays), plain)


def same_bits(found: Rows, expected: Rows) -> bool:
    try:
        assert_same_bits(found, expected)
    except AssertionError:
        return False
    return True


def own_name(name: str) -> str:
    """The name that a tensor has without the `checkpoint_wrapper` around its module."""
    return name.replace("_checkpoint_wrapped_module.", "")


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {
        own_name(name): None if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, also those that are not saved."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {own_name(name): tensor.detach().clone() for name, tensor in tensors}


def training(
    model: nn.Module, batches: Iterable[Any], loss_of: Callable[[Any], Tensor], **options: Any
) -> dict[str, Any]:
    """Trains with AdamW: losses and gradients of each step, the model's state after the last."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, **options)
    steps = []
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_of(batch)
        loss.backward()
        steps.append((loss.detach().clone(), gradients(model)))
        optimizer.step()
    return {"steps": steps, "state": state(model)}

"""What the programs share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy

from ..registry import ClearError

CHECKPOINT_ERROR = ("CheckpointError",)


def clear(pattern: str, *kinds: str) -> ClearError:
    """A CheckpointError (or one of `kinds`, by name) whose message matches `pattern`."""
    return ClearError(kinds or CHECKPOINT_ERROR, pattern)


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def grads(tensors: Iterable[Tensor]) -> list[Tensor | None]:
    return [t.grad for t in tensors]


def agreed(seen: Iterable[Any]) -> list[Any]:
    """The different values of `seen`: a replay that saw what the forward saw adds none.

    The plain program calls a function once and the checkpointed one twice, so what the calls saw
    can only be compared without their number.
    """
    different: list[Any] = []
    for value in seen:
        if value not in different:
            different.append(value)
    return different


def saving(*names: str) -> Any:
    """A policy of selective checkpointing that saves the operators with these names."""

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = str(operator).removeprefix("aten.").partition(".")[0]
        return CheckpointPolicy.MUST_SAVE if name in names else CheckpointPolicy.PREFER_RECOMPUTE

    return policy

"""The errors of this library and the checks of what users pass in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils import checkpoint as torch_checkpoint


class CheckpointError(torch_checkpoint.CheckpointError):
    """A replay cannot be, or was not, what the forward was.

    A subclass of ``torch.utils.checkpoint.CheckpointError`` (a
    ``RuntimeError``), so that existing ``except`` clauses keep working. The
    message names the checkpointed function, what was expected and found, and
    the source line of the forward.
    """


def require_callable(name: str, value: Any) -> None:
    if not callable(value):
        raise TypeError(
            f"{name} must be callable, got {type(value).__name__}: {value!r:.100}. "
            f"Pass the function or module to checkpoint first, then its arguments."
        )


def require_bool(name: str, value: Any) -> None:
    if value is not True and value is not False:
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}: {value!r:.100}")


def require_optional_bool(name: str, value: Any) -> None:
    if value is not None and value is not True and value is not False:
        raise TypeError(
            f"{name} must be True, False or None, got {type(value).__name__}: {value!r:.100}"
        )


def require_generators(name: str, value: Any) -> tuple[torch.Generator, ...]:
    if isinstance(value, torch.Generator):
        value = (value,)
    if not isinstance(value, Iterable):
        raise TypeError(
            f"{name} must be torch.Generator objects, got {type(value).__name__}: {value!r:.100}"
        )
    found = tuple(value)
    for position, generator in enumerate(found):
        if not isinstance(generator, torch.Generator):
            raise TypeError(
                f"{name}[{position}] must be a torch.Generator, got "
                f"{type(generator).__name__}: {generator!r:.100}"
            )
    return found

"""The errors of this library and the checks of what users pass in."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable
from types import FrameType
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
        hint = (
            " Pass the function or module to checkpoint first, then its arguments."
            if name == "function"
            else ""
        )
        raise TypeError(
            f"{name} must be callable, got {type(value).__name__}: {value!r:.100}.{hint}"
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


def running_module() -> str:
    """The innermost module that this thread runs, from the outermost one of the replay on.

    ``"Block.mlp.fc1 (Linear)"``; empty if no module is running. Looks at frames, for messages.
    """
    modules: list[torch.nn.Module] = []
    frame: FrameType | None = sys._getframe(1)
    # Above the call of the engine are the modules of whoever calls backward.
    while frame is not None and frame.f_code.co_name != "_engine_run_backward":
        owner = frame.f_locals.get("self")
        if isinstance(owner, torch.nn.Module) and not (modules and modules[-1] is owner):
            modules.append(owner)
        frame = frame.f_back
    if not modules:
        return ""
    modules.reverse()
    path = type(modules[0]).__name__
    for outer, inner in itertools.pairwise(modules):
        name = next((n for n, m in outer.named_modules() if m is inner), type(inner).__name__)
        path += f".{name}"
    return path if len(modules) == 1 else f"{path} ({type(modules[-1]).__name__})"

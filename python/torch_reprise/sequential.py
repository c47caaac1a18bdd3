"""``checkpoint_sequential``: a chain of functions in segments of even length."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ._errors import require_bool, require_callable, require_optional_bool
from .checkpoint import _warn_use_reentrant, checkpoint

__all__ = ["checkpoint_sequential"]


class _Chain:
    """Consecutive functions of a chain as one."""

    def __init__(self, functions: Sequence[Callable[..., Any]]) -> None:
        self._functions = functions

    def __call__(self, value: Any) -> Any:
        for function in self._functions:
            value = function(value)
        return value


def _is_sequence(value: Any) -> bool:
    return (
        hasattr(type(value), "__len__")
        and hasattr(type(value), "__getitem__")
        and not isinstance(value, (str, bytes, Mapping, torch.Tensor))
    )


def _even_pieces(length: int, pieces: int) -> list[slice]:
    """Consecutive slices whose lengths differ by at most one, longer ones first."""
    short, longer = divmod(length, pieces)
    slices, start = [], 0
    for piece in range(pieces):
        end = start + short + (1 if piece < longer else 0)
        slices.append(slice(start, end))
        start = end
    return slices


def checkpoint_sequential(
    functions: torch.nn.Sequential | Sequence[Callable[..., Any]],
    segments: int,
    input: Any,
    use_reentrant: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Runs ``functions`` one after the other, in checkpointed segments.

    The last segment is not checkpointed: its backward comes first, so its saved
    tensors would be recomputed at once.

    Args:
        functions: an ``nn.Sequential``, or another sequence of modules or functions,
            each taking the value that the one before returned.
        segments: how many pieces to cut the chain into, at least 1. Their lengths
            differ by at most one (torch puts the whole remainder into the last:
            9 functions in 5 segments are 1, 1, 1, 1, 5 there and 2, 2, 2, 2, 1
            here). More segments than functions mean one function each.
        input: what the first function takes.
        use_reentrant: as in :func:`checkpoint`; None warns and means True.
        preserve_rng_state: as in :func:`checkpoint`.

    Raises:
        TypeError: ``functions`` or ``segments`` is of another type.
        ValueError: no functions, fewer than one segment, or an unknown keyword.
    """
    preserve_rng_state = kwargs.pop("preserve_rng_state", True)
    if kwargs:
        raise ValueError(
            f"checkpoint_sequential does not know the keyword arguments {', '.join(kwargs)}; "
            "it takes use_reentrant and preserve_rng_state"
        )
    require_bool("preserve_rng_state", preserve_rng_state)
    require_optional_bool("use_reentrant", use_reentrant)
    if not _is_sequence(functions):
        raise TypeError(
            "functions must be an nn.Sequential or a sequence of modules or functions, got "
            f"{type(functions).__name__}"
        )
    # Not children(): that passes over a module that occurs a second time.
    chain = [functions[position] for position in range(len(functions))]
    for position, function in enumerate(chain):
        require_callable(f"functions[{position}]", function)
    if isinstance(segments, bool) or not hasattr(segments, "__index__"):
        raise TypeError(f"segments must be an int, got {type(segments).__name__}: {segments!r}")
    segments = operator.index(segments)
    if not chain:
        raise ValueError("functions is empty: there is nothing to run")
    if segments < 1:
        raise ValueError(f"segments must be at least 1, got {segments}")
    if use_reentrant is None:
        _warn_use_reentrant("checkpoint_sequential", stacklevel=2)
        use_reentrant = True
    pieces = _even_pieces(len(chain), min(segments, len(chain)))
    value = input
    for piece in pieces[:-1]:
        value = checkpoint(
            _Chain(chain[piece]),
            value,
            use_reentrant=use_reentrant,
            preserve_rng_state=preserve_rng_state,
        )
    return _Chain(chain[pieces[-1]])(value)

"""What a tracer gets to see instead of a segment: torch's own entry.

``torch.compile`` and ``torch.export`` make a graph of what runs and decide
themselves what is recomputed. They know checkpointing by torch's function: Dynamo
makes an operator of a call of it, and what runs later under the tracing of
autograd tags the nodes to recompute.

Note [Dynamo]

    @torch.compile
    def step(x):
        return checkpoint(block, x, use_reentrant=False)

Dynamo goes into our ``checkpoint``, finds ``is_dynamo_compiling()`` true and the
call of torch's function. If it cannot make a graph of ``block``, it breaks the graph
there, and calls our ``checkpoint`` as it is: that frame must not be traced from its
top, where it would find the same, so its code is marked as skipped. ``block`` then runs
without Dynamo, in forward and replay (``csrc/bindings/dynamo.h``), for the frames
of a replay that backward calls would be compiled otherwise than those of the
forward. A function that was compiled by itself is called as such in both.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch.utils import checkpoint as torch_checkpoint

from . import _C, _compat

__all__ = [
    "called_by_compiled_code",
    "in_graph",
    "is_dynamo_compiling",
    "under_tracer",
    "unpack_outside_graph",
]

# Taken before install() puts ours there.
_original: Any = torch_checkpoint.checkpoint
# torch 2.14 has an option that 2.13 does not know.
_OPTIONS = frozenset(inspect.signature(_original).parameters) | {"preserve_rng_state"}

# True in Dynamo's eyes, False when it runs. Costs tens of nanoseconds.
is_dynamo_compiling = torch.compiler.is_dynamo_compiling


def in_graph(
    function: Callable[..., Any], args: Any, kwargs: Any, context_fn: Callable[..., Any] | None
) -> Any:
    """The call as Dynamo is to see it: of torch's function, whichever that is now.

    Of the options only ``context_fn`` means something to the compiler. Under strict
    ``torch.export``, which has no backward and refuses the operator, the plain call.
    """
    if torch.compiler.is_exporting():
        return function(*args, **kwargs)
    if kwargs:
        # Not as keyword arguments: torch's function would take those for its own that have
        # the name of an option.
        function = functools.partial(function, **kwargs)
    if context_fn is None:
        return torch_checkpoint.checkpoint(function, *args, use_reentrant=False)
    return torch_checkpoint.checkpoint(function, *args, use_reentrant=False, context_fn=context_fn)


def under_tracer(
    function: Callable[..., Any],
    args: Any,
    kwargs: Any,
    context_fn: Callable[..., Any] | None,
    **options: Any,
) -> Any:
    """The call where something makes a graph of all that runs, autograd's work included.

    That is what comes after Dynamo, and export. There is no reentrant form of it.
    """
    if kwargs:
        function = functools.partial(function, **kwargs)
    known = {name: value for name, value in options.items() if name in _OPTIONS}
    if context_fn is not None:
        known["context_fn"] = context_fn
    return _original(function, *args, use_reentrant=False, **known)


def called_by_compiled_code() -> bool:
    """Is it Dynamo's graph, which runs as it is (backend="eager"), that calls ``checkpoint``?

    The graph asks for ``preserve_rng_state=False``, since a compiler looks after random numbers
    itself, and nobody does where there is none (torch 2.13 to 2.15).
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__package__") == __package__:
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__") == "torch._higher_order_ops.wrap"


def _unpack(packed: Any) -> torch.Tensor:
    return _C.unpack(packed)


# What the graph of a compiled backward calls for a saved tensor: a replay is no part of it.
unpack_outside_graph = _compat.without_dynamo(_unpack)

"""A segment around a forward that somebody else runs, in the shape of torch's private generator.

``torch.distributed._composable.checkpoint``, torch_remat and others call
``torch.utils.checkpoint._checkpoint_without_reentrant_generator`` with positional
arguments, or since torch 2.14 ``_checkpoint_without_reentrant_generator_impl`` with those of
the function apart, advance it once before the forward and once after. ``install`` puts these
functions in their place.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from torch.utils import checkpoint as torch_checkpoint

from . import _C
from ._contexts import ContextFn
from ._errors import CheckpointError, require_callable
from .checkpoint import _contexts_of, _flags, _stops_early, _validate, noop_context_fn

# Taken before install() puts ours there. The first calls the second, where there is one.
_original: Any = torch_checkpoint._checkpoint_without_reentrant_generator
_original_impl: Any = getattr(
    torch_checkpoint, "_checkpoint_without_reentrant_generator_impl", None
)


# In the order of the first one's positions.
_DEFAULTS: dict[str, Any] = {
    "preserve_rng_state": True,
    "context_fn": noop_context_fn,
    "determinism_check": "default",
    "debug": False,
    "early_stop": True,
    "respect_saved_tensors_hooks": None,
}


def checkpoint_without_reentrant_generator(
    fn: Any,
    preserve_rng_state: bool = True,
    context_fn: ContextFn = noop_context_fn,
    determinism_check: str = "default",
    debug: bool = False,
    early_stop: bool = True,
    *args: Any,
    respect_saved_tensors_hooks: bool | None = None,
    **kwargs: Any,
) -> Generator[None, None, None]:
    """The arguments of ``fn`` behind the options: the only way until torch 2.13."""
    given = (preserve_rng_state, context_fn, determinism_check, debug, early_stop)
    options = dict(zip(_DEFAULTS, (*given, respect_saved_tensors_hooks), strict=True))
    return checkpoint_without_reentrant_generator_impl(fn, args, kwargs, **options)


def checkpoint_without_reentrant_generator_impl(
    fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], **given: Any
) -> Generator[None, None, None]:
    """Yields once: what the caller runs until it goes on is the forward of ``fn(*args, **kwargs)``.

    Replays call ``fn``. An error of the forward is to be thrown in. ``given``: options by name.
    """
    options = {**_DEFAULTS, **given}
    if _C.is_traced() or torch.compiler.is_dynamo_compiling():
        if _original_impl is not None:
            yield from _original_impl(fn, args, kwargs, **options)
        else:
            *positional, _ = options.values()
            yield from _original(fn, *positional, *args, **kwargs)
        return
    require_callable("function", fn)
    _validate(use_reentrant=False, **options)
    preserve, context_fn = options["preserve_rng_state"], options["context_fn"]
    contexts, session = _contexts_of(
        context_fn, options["respect_saved_tensors_hooks"], preserve, options["debug"]
    )
    forward, replay = contexts() if contexts is not None else (None, None)
    flags = _flags(
        _stops_early(options["early_stop"]), preserve, options["determinism_check"], context_fn
    )
    segment = _C.open_segment(fn, args, kwargs, flags, replay, session)
    if segment is None:
        yield
        return
    returned = False
    try:
        if forward is None:
            yield
            returned = True
        else:
            with forward:
                yield
                returned = True
    except BaseException:
        segment.abandon()
        raise
    if not returned:
        segment.abandon()
        raise CheckpointError(_C.SUPPRESSED)
    segment.end()

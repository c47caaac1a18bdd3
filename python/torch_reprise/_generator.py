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
from .checkpoint import _contexts_of, _flags, _validate, noop_context_fn

# Taken before install() puts ours there. The first calls the second, where there is one.
_original: Any = torch_checkpoint._checkpoint_without_reentrant_generator
_original_impl: Any = getattr(
    torch_checkpoint, "_checkpoint_without_reentrant_generator_impl", None
)


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
    return checkpoint_without_reentrant_generator_impl(
        fn,
        args,
        kwargs,
        preserve_rng_state=preserve_rng_state,
        context_fn=context_fn,
        determinism_check=determinism_check,
        debug=debug,
        early_stop=early_stop,
        respect_saved_tensors_hooks=respect_saved_tensors_hooks,
    )


def checkpoint_without_reentrant_generator_impl(
    fn: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    preserve_rng_state: bool = True,
    context_fn: ContextFn = noop_context_fn,
    determinism_check: str = "default",
    debug: bool = False,
    early_stop: bool = True,
    respect_saved_tensors_hooks: bool | None = None,
) -> Generator[None, None, None]:
    """Yields once: what the caller runs until it goes on is the forward of ``fn(*args, **kwargs)``.

    Replays call ``fn``. An error of the forward is to be thrown in.
    """
    if _C.is_traced() or torch.compiler.is_dynamo_compiling():
        options = {
            "preserve_rng_state": preserve_rng_state,
            "context_fn": context_fn,
            "determinism_check": determinism_check,
            "debug": debug,
            "early_stop": early_stop,
        }
        if _original_impl is not None:
            yield from _original_impl(
                fn,
                args,
                kwargs,
                respect_saved_tensors_hooks=respect_saved_tensors_hooks,
                **options,
            )
        else:
            yield from _original(fn, *options.values(), *args, **kwargs)
        return
    require_callable("function", fn)
    _validate(
        respect_saved_tensors_hooks=respect_saved_tensors_hooks,
        preserve_rng_state=preserve_rng_state,
        early_stop=early_stop,
        debug=debug,
        determinism_check=determinism_check,
        context_fn=context_fn,
        use_reentrant=False,
    )
    contexts, session = _contexts_of(
        context_fn, respect_saved_tensors_hooks, preserve_rng_state, debug
    )
    forward, replay = contexts() if contexts is not None else (None, None)
    flags = _flags(early_stop, preserve_rng_state, determinism_check, context_fn)
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

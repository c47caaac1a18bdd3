"""The only door of the Python layer to what torch does not promise to keep.

Each name says which torch it was tested with; ``tests/test_compat.py`` fails
loudly when one of them goes away.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import checkpoint as torch_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import _C

Hooks = tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]


def torch_directory() -> str:
    """The folder of the installed torch, with a separator at its end."""
    return os.path.join(os.path.dirname(os.path.abspath(torch.__file__)), "")


def own_files() -> list[str]:
    """The files of this package, without the demo and the benchmarks: those are programs."""
    here = os.path.dirname(os.path.abspath(__file__))
    return [os.path.join(here, name) for name in os.listdir(here) if name.endswith(".py")]


def user_hooks() -> Hooks | None:
    """The innermost saved-tensor hooks that are the user's, not checkpointing's.

    torch 2.13 and 2.14: ``_top_saved_tensors_default_hooks`` gives the top of
    the stack; the pack hooks of this library (and torch's own, from 2.14 on)
    are marked ``_checkpoint_internal`` and know what lies below them.
    """
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)
    while hooks is not None and getattr(hooks[0], "_checkpoint_internal", False):
        hooks = hooks[0]._user_hooks
    found: Hooks | None = hooks
    return found


def is_selective(context: object) -> bool:
    """Is this the forward context of ``create_selective_checkpoint_contexts``?"""
    return isinstance(context, torch_checkpoint._CachingTorchDispatchMode)


class _Entry:
    """What selective checkpointing keeps of one tensor, with what we add to it.

    Stands in for torch's ``_VersionWrapper``, of which only ``get_val`` is called
    (2.13 and 2.14).
    """

    def __init__(self, inner: Any, hooks: Hooks | None, after: Any) -> None:
        self._inner = inner
        self._after = after
        self._unpack: Callable[[Any], torch.Tensor] | None = None
        if hooks is not None:
            self._packed = hooks[0](inner.val)
            self._unpack = hooks[1]
            self._inner = None

    def get_val(self, allow_cache_entry_mutation: bool) -> Any:
        if self._after is not None:
            self._after.restore()
        if self._unpack is not None:
            return self._unpack(self._packed)
        return self._inner.get_val(allow_cache_entry_mutation)


class _Additions:
    """Shared by the policy and the storage of one forward: what the next entries get."""

    def __init__(self, hooks: Hooks | None) -> None:
        self.hooks = hooks
        self.after: Any = None


class _Storage(dict[int, Any]):
    """The per-operator dict of selective checkpointing; adds to what is put in."""

    def __init__(self, additions: _Additions) -> None:
        super().__init__()
        self._additions = additions

    def __setitem__(self, index: int, value: Any) -> None:
        if value is torch_checkpoint._CONSUMED:
            # It was taken for a replay. Backward may come again: with retain_graph, from a gradient
            # of a gradient, or when somebody merely looks at a saved tensor.
            if not _C.graph_is_retained():
                super().__setitem__(index, value)
            return
        hooks, after = self._additions.hooks, self._additions.after
        if hooks is None and after is None:
            super().__setitem__(index, value)
            return

        def wrap(entry: Any) -> Any:
            if not hasattr(entry, "get_val"):
                return entry
            pack = hooks if isinstance(entry.val, torch.Tensor) else None
            return _Entry(entry, pack, after) if pack is not None or after is not None else entry

        super().__setitem__(index, torch.utils._pytree.tree_map(wrap, value))


class _PassesCachedCasts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Marks the modes made by :func:`_passing_cached_casts`."""


@functools.cache
def _passing_cached_casts(mode_type: Any) -> Any:
    """The same mode, which does not see autocast's casts of leaves.

    Autocast keeps these in a cache: the forward of a segment takes the one that was made by a
    segment before, the replay makes its own. Neither saved nor counted, they may differ.

    Dynamo is kept out of it as it is kept out of a segment, not by the wrapper that torch puts
    around every dispatch (2.13 and 2.14), which costs microseconds at each operator.
    """
    if issubclass(mode_type, _PassesCachedCasts):
        return mode_type
    dispatch: Any = inspect.unwrap(mode_type.__torch_dispatch__)
    is_replay = issubclass(mode_type, torch_checkpoint._CachedTorchDispatchMode)

    def __torch_dispatch__(
        self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if (
            func is torch.ops.aten._to_copy.default
            and args[0].is_leaf
            and args[0].requires_grad
            and (kwargs or {}).get("dtype") in (torch.bfloat16, torch.float16)
        ):
            return func(*args, **(kwargs or {}))
        if is_replay and _places_written(func):
            return _change_arguments_too(dispatch, self, func, args, kwargs or {})
        return dispatch(self, func, types, args, kwargs)

    skip_frames_of(__torch_dispatch__, with_callees=True)
    contents = {
        "__torch_dispatch__": __torch_dispatch__,
        "_should_skip_dynamo": classmethod(lambda cls: False),
    }
    return type(mode_type.__name__, (_PassesCachedCasts, mode_type), contents)


@functools.cache
def _draws(operator: Any) -> bool:
    """Does it draw random numbers? Of custom operators nobody knows: the tag is often forgotten."""
    tagged = torch.Tag.nondeterministic_seeded in getattr(operator, "tags", ())
    return tagged or getattr(operator, "namespace", "") not in ("aten", "prim", "prims")


@functools.cache
def _places_written(operator: Any) -> tuple[tuple[int, str], ...]:
    """The arguments that an operator changes: their places and names."""
    schema = getattr(operator, "_schema", None)
    if schema is None or not schema.is_mutable:
        return ()
    return tuple(
        (place, argument.name)
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _is_cached(mode: Any, func: Any, args: Any) -> bool:
    """Does the replay's mode take the output of its next call of an operator from the cache?

    torch 2.13 to 2.15: ``storage`` by ``_sac_storage_key``, and therein by how often it was called.
    """
    key_of: Any = torch_checkpoint._sac_storage_key
    key = key_of(func, args)
    entry = mode.storage.get(key, {}).get(mode.func_counter[key])
    computed = (None, torch_checkpoint._CONSUMED, torch_checkpoint._RECOMPUTE)
    return all(entry is not mark for mark in computed)


def _change_arguments_too(dispatch: Any, mode: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """What an operator that changes its arguments does where its output comes from the cache.

    torch gives the output and leaves the arguments as they are, though fn may go on with them. They
    get what the cache has; where that is the same memory, a buffer of which the replay has made
    again what the forward began with, the operator runs.
    """
    is_cached = _is_cached(mode, func, args)
    result = dispatch(mode, func, (), args, kwargs)
    if not is_cached:
        return result
    written = []
    for place, name in _places_written(func):
        value = args[place] if place < len(args) else kwargs.get(name)
        written += [v for v in tree_leaves(value) if isinstance(v, torch.Tensor)]
    cached = [value for value in tree_leaves(result) if isinstance(value, torch.Tensor)]
    memory = {tensor.untyped_storage()._cdata for tensor in cached}
    if any(tensor.untyped_storage()._cdata in memory for tensor in written):
        return func(*args, **kwargs)
    if len(written) == len(cached) == 1 and written[0].shape == cached[0].shape:
        return written[0].copy_(cached[0])
    return result


def support_selective(
    context: object, replay: object, respect: bool | None, preserve_rng_state: bool
) -> None:
    """Makes the contexts of selective checkpointing do five more things.

    Saved outputs go through the user's saved-tensor hooks, if ``respect``; torch
    2.14 has this in its own mode object, as an attribute, 2.13 does not.

    And an operator whose output is served from the cache leaves the generators
    where it left them in the forward, so that later draws of the replay are
    those of the forward.

    What a replay took from the cache stays there for as long as backward may come again (torch
    raises at the second backward), and casts that autocast caches pass
    (:class:`_PassesCachedCasts`). Operators that change an argument do so in the replay as well.

    torch 2.13 and 2.14 call the mode's ``policy_fn`` right
    after the operator ran and right before its output is put into ``storage``, a
    ``defaultdict`` of dicts by operator.
    """
    if not is_selective(context):
        return
    mode: Any = context
    for each in (mode, replay):
        if isinstance(each, TorchDispatchMode):
            mode_type: Any = type(each)
            each.__class__ = _passing_cached_casts(mode_type)
    hooks = None
    if hasattr(mode, "respect_saved_tensors_hooks"):
        mode.respect_saved_tensors_hooks = respect
    elif respect:
        hooks = user_hooks()
    additions = _Additions(hooks)
    if preserve_rng_state:
        policy = mode.policy_fn

        def noting(ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> Any:
            additions.after = rng_snapshot(args, kwargs) if _draws(operator) else None
            return policy(ctx, operator, *args, **kwargs)

        mode.policy_fn = noting
    storage: defaultdict[Any, Any] = mode.storage
    storage.default_factory = lambda: _Storage(additions)


def rng_snapshot(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The default generators and those among an operator's arguments, where they are now."""
    explicit = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Generator)]
    return _C.RngSnapshot.capture([*_C.default_generators(), *explicit])


def allow_transforms_inside() -> None:
    """Lets ``torch.func`` transforms begin inside of a segment.

    They refuse to while there are saved-tensor hooks, which a running segment has. What they save
    is theirs and is gone when they end, so our hooks step aside; the user's are refused as always.
    torch 2.13 and 2.14: ``torch._functorch.vmap`` calls ``disable_saved_tensors_hooks``, which
    calls these two.
    """
    autograd: Any = torch._C._autograd
    disable, enable = (
        autograd._saved_tensors_hooks_disable,
        autograd._saved_tensors_hooks_enable,
    )
    if getattr(disable, "_torch_reprise", False):
        return

    @functools.wraps(disable)
    def disable_after_hiding(message: str, *args: Any, **kwargs: Any) -> None:
        _C.hide_own_hooks()
        try:
            disable(message, *args, **kwargs)
        except BaseException:
            _C.show_own_hooks()
            raise

    @functools.wraps(enable)
    def enable_and_show() -> None:
        enable()
        _C.show_own_hooks()

    disable_after_hiding._torch_reprise = True  # type: ignore[attr-defined]
    autograd._saved_tensors_hooks_disable = disable_after_hiding
    autograd._saved_tensors_hooks_enable = enable_and_show


def skip_frames_of(*functions: Any, with_callees: bool = False) -> None:
    """Dynamo does not trace frames of these from their top; it goes into them when it inlines.

    ``with_callees``: nor what they call.

    torch 2.13 and 2.14: what ``torch._dynamo.eval_frame.skip_code`` does, without the
    seconds that an import of ``torch._dynamo`` takes.
    """
    dynamo: Any = torch._C._dynamo.eval_frame
    action = dynamo._FrameAction
    strategy = dynamo._FrameExecStrategy(
        action.SKIP, action.SKIP if with_callees else action.DEFAULT
    )
    for function in functions:
        dynamo.set_code_exec_strategy(function.__code__, strategy)


def without_dynamo(function: Any) -> Any:
    """A function that Dynamo calls as it is; imports ``torch._dynamo`` when it is called.

    torch 2.13 and 2.14: ``torch.compiler.disable`` would import it at once.
    """
    private: Any = torch
    return private._disable_dynamo(function)

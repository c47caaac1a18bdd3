"""The only door of the Python layer to what torch does not promise to keep.

Each name says which torch it was tested with; ``tests/test_compat.py`` fails
loudly when one of them goes away.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import checkpoint as torch_checkpoint

Hooks = tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]


def torch_directory() -> str:
    """The folder of the installed torch, with a separator at its end."""
    return os.path.join(os.path.dirname(os.path.abspath(torch.__file__)), "")


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


class _PackedEntry:
    """What selective checkpointing keeps of one tensor, packed by the user's hooks.

    Stands in for torch 2.13's ``_VersionWrapper``, of which only ``get_val`` is
    called.
    """

    def __init__(self, entry: Any, hooks: Hooks) -> None:
        self._packed = hooks[0](entry.val)
        self._unpack = hooks[1]

    def get_val(self, allow_cache_entry_mutation: bool) -> torch.Tensor:
        return self._unpack(self._packed)


class _PackingStorage(dict[int, Any]):
    """The per-operator dict of selective checkpointing; packs what is put in."""

    def __init__(self, hooks: Hooks) -> None:
        super().__init__()
        self._hooks = hooks

    def __setitem__(self, index: int, value: Any) -> None:
        def pack(entry: Any) -> Any:
            if isinstance(getattr(entry, "val", None), torch.Tensor):
                return _PackedEntry(entry, self._hooks)
            return entry

        super().__setitem__(index, torch.utils._pytree.tree_map(pack, value))


def respect_hooks(context: object, respect: bool | None) -> None:
    """Routes what selective checkpointing saves through the user's hooks, or not.

    torch >= 2.14 has this in its own mode object, as an attribute. torch 2.13
    does not: there the mode's storage (a ``defaultdict`` of dicts, filled by
    operator) gets dicts that pack what is put into them.
    """
    if not is_selective(context):
        return
    if hasattr(context, "respect_saved_tensors_hooks"):
        context.respect_saved_tensors_hooks = respect
        return
    hooks = user_hooks()
    if not respect or hooks is None:
        return
    storage: defaultdict[Any, Any] = context.storage  # type: ignore[attr-defined]
    found = hooks
    storage.default_factory = lambda: _PackingStorage(found)

"""Putting this library in the place of ``torch.utils.checkpoint``, and back.

Programs reach checkpointing through libraries, which reach it in two ways: as an
attribute of the module ``torch.utils.checkpoint`` when they call, or through a
name of their own that they bound when they were imported. Both are changed, and
changed back to the very same objects.

What is put there are copies (functions with the same code, subclasses), not the
functions of ``torch_reprise`` themselves. So a name that a program bound to ours
on purpose is told from one that was ours only because of ``install``; and
Dynamo, which knows checkpoint by being the attribute
``torch.utils.checkpoint.checkpoint``, takes ours for it.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

from torch.utils import checkpoint as torch_checkpoint

from . import checkpoint as own
from . import debug, rng, sequential
from ._generator import (
    checkpoint_without_reentrant_generator,
    checkpoint_without_reentrant_generator_impl,
)

__all__ = ["install", "installed", "is_installed", "uninstall"]

# The name in torch.utils.checkpoint, and what replaces it. Not in the list, for they are
# torch's own here too: CheckpointError (ours is a kind of it), selective checkpointing,
# and the helpers that other libraries take from there (_infer_device_type,
# _get_autocast_kwargs, _get_device_module, DefaultDeviceType).
_REPLACED: dict[str, Any] = {
    "checkpoint": own.checkpoint,
    "checkpoint_sequential": sequential.checkpoint_sequential,
    "CheckpointFunction": own.CheckpointFunction,
    "GraphExecGroup": own.GraphExecGroup,
    "check_backward_validity": own.check_backward_validity,
    "detach_variable": own.detach_variable,
    "get_device_states": rng.get_device_states,
    "set_device_states": rng.set_device_states,
    "set_checkpoint_debug_enabled": debug.set_checkpoint_debug_enabled,
    "set_checkpoint_early_stop": own.set_checkpoint_early_stop,
    "_checkpoint_without_reentrant_generator": checkpoint_without_reentrant_generator,
}
if hasattr(torch_checkpoint, "_checkpoint_without_reentrant_generator_impl"):  # since 2.14
    _REPLACED["_checkpoint_without_reentrant_generator_impl"] = (
        checkpoint_without_reentrant_generator_impl
    )


def _copy(value: Any, name: str) -> Any:
    """The same function or class once more, at home in ``torch.utils.checkpoint``."""
    where = torch_checkpoint.__name__
    if isinstance(value, FunctionType):
        copy = FunctionType(
            value.__code__, value.__globals__, name, value.__defaults__, value.__closure__
        )
        functools.update_wrapper(copy, value)
        del copy.__dict__["__wrapped__"]
        copy.__kwdefaults__ = value.__kwdefaults__
        copy.__module__, copy.__name__, copy.__qualname__ = where, name, name
        return copy
    return type(name, (value,), {"__module__": where, "__qualname__": name, "__slots__": ()})


_lock = threading.RLock()
_copies: dict[str, Any] = {name: _copy(value, name) for name, value in _REPLACED.items()}
_originals: dict[str, Any] = {}  # empty while nothing is installed


def is_installed() -> bool:
    """Whether ``torch.utils.checkpoint`` is this library now."""
    return bool(_originals)


def _rebind(old_to_new: dict[int, Any]) -> None:
    """Changes the names of all loaded modules that are bound to one of the objects.

    Reads the modules' dicts, not their attributes: asking a lazy module would import what
    it stands for.
    """
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType) or module.__name__.partition(".")[0] == __package__:
            continue
        names = module.__dict__
        for name, value in list(names.items()):
            new = old_to_new.get(id(value))
            if new is not None:
                names[name] = new


def install() -> None:
    """Makes ``torch.utils.checkpoint`` this library, for the whole process.

    Programs and libraries that call it, or that bound its functions by name at the top
    of a module, run on this library from now on, without a change of theirs::

        import torch_reprise

        torch_reprise.install()
        model.gradient_checkpointing_enable()  # Transformers, timm, Lightning, FSDP, ...

    Call it before checkpointing is switched on in a model: what holds torch's function
    otherwise (a ``functools.partial`` made before, a default argument, an attribute of an
    object) keeps it, as a front that costs some microseconds more; the segments behind it
    are ours. Segments that exist already end as they began. Inside of functions
    that ``torch.compile`` or ``torch.export`` traces, the compiler's own checkpointing is
    used, as without this call.

    Calling it again changes nothing. May be called from any thread.
    """
    with _lock:
        if _originals:
            return
        originals = {name: getattr(torch_checkpoint, name) for name in _copies}
        _rebind({id(originals[name]): copy for name, copy in _copies.items()})
        _originals.update(originals)


def uninstall() -> None:
    """Undoes :func:`install`: every name is bound again to the object it was bound to.

    Also the names of modules that were imported in between. Does nothing if nothing is
    installed. Segments that exist end as they began.
    """
    with _lock:
        if not _originals:
            return
        _rebind({id(copy): _originals[name] for name, copy in _copies.items()})
        _originals.clear()


@contextmanager
def installed() -> Iterator[None]:
    """:func:`install` for a block. Inside of another one, or after ``install``, it changes nothing.

    For the process, as ``install`` is: other threads see it too.
    """
    with _lock:
        outermost = not _originals
        install()
    try:
        yield
    finally:
        if outermost:
            uninstall()

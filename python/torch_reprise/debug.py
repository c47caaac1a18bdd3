"""Finding out why a replay was not its forward: the log of operators of both.

With ``debug=True`` each segment notes the operators of its forward and of its
replay, with the place in the program that called them. A CheckpointError then
shows both logs side by side from a few lines before their first difference.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import _compat
from ._contexts import ContextFn, Contexts, ContextSetting

__all__ = ["set_checkpoint_debug_enabled"]

debug_setting: ContextVar[bool | None] = ContextVar("torch_reprise.debug", default=None)


class set_checkpoint_debug_enabled(ContextSetting):
    """Context manager and decorator: whether segments note their operators for error messages.

    Args:
        enabled: True or False overrides the ``debug`` argument of every
            checkpoint that begins inside; None leaves it to the argument.

    The setting belongs to the current thread or task (a context variable);
    torch's is one for the process.
    """

    def __init__(self, enabled: bool | None) -> None:
        if enabled is not None and not isinstance(enabled, bool):
            raise TypeError(
                f"enabled must be True, False or None, got {type(enabled).__name__}: {enabled!r}"
            )
        super().__init__(debug_setting, enabled)


class _Operator(NamedTuple):
    text: str
    """Operator, argument shapes and result shapes; what the two runs are compared by."""
    stack: tuple[str, ...]
    """Places in the program, innermost first."""


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        name = str(value.dtype).removeprefix("torch.")
        # Strided nested tensors have no shape, and an error in here would end the process.
        nested = value.is_nested and value.layout == torch.strided
        shape = "[nested]" if nested else str(list(value.shape))
        return f"{name}{shape}" + ("" if value.device.type == "cpu" else f" on {value.device}")
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_describe(item) for item in value) + "]"
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _program_stack(limit: int = 6) -> tuple[str, ...]:
    internal = (_compat.torch_directory(), __file__.rsplit("debug.py", 1)[0])
    places: list[str] = []
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and len(places) < limit:
        code = frame.f_code
        if not code.co_filename.startswith(internal) and not code.co_filename.startswith("<"):
            places.append(f"{code.co_filename}:{frame.f_lineno} in {code.co_name}")
        frame = frame.f_back
    return tuple(places)


class _OperatorLog(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes each operator that reaches the dispatcher below autograd."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[_Operator] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # Saving a tensor detaches it in other places in a replay than in a forward.
        if func is torch.ops.aten.detach.default:
            return func(*args, **kwargs)
        given = [_describe(value) for value in args]
        given += [f"{name}={_describe(value)}" for name, value in kwargs.items()]
        text = f"{func}({', '.join(given)})"
        # Noted before it runs: an operator that fails belongs to the log.
        place = len(self.operators)
        self.operators.append(_Operator(text, _program_stack()))
        result = func(*args, **kwargs)
        made = ", ".join(_describe(value) for value in tree_leaves(result))
        self.operators[place] = self.operators[place]._replace(text=f"{text} -> {made}")
        return result


class DebugSession:
    """The operator logs of one segment. The compiled core asks it for ``report()``."""

    def __init__(self) -> None:
        self._forward: list[_Operator] = []
        self._replay: list[_Operator] = []

    def wrap(self, context_fn: ContextFn | None) -> ContextFn:
        """A context_fn that logs inside the contexts of ``context_fn``."""

        @contextmanager
        def logging(outer: AbstractContextManager[Any] | None, is_replay: bool) -> Any:
            log = _OperatorLog()
            if is_replay:
                self._replay = log.operators
            else:
                self._forward = log.operators
            with ExitStack() as stack:
                if outer is not None:
                    stack.enter_context(outer)
                stack.enter_context(log)
                yield

        def contexts() -> Contexts:
            outer = (None, None) if context_fn is None else context_fn()
            return _Reusable(lambda: logging(outer[0], False)), _Reusable(
                lambda: logging(outer[1], True)
            )

        return contexts

    def report(self) -> str:
        """Both logs around their first difference, as text."""
        forward, replay = self._forward, self._replay
        same = 0
        while (
            same < len(forward) and same < len(replay) and forward[same].text == replay[same].text
        ):
            same += 1
        lines = [
            f"Operators: {len(forward)} in the forward, {len(replay)} in the replay "
            "(which stops early when it has all it needs)."
        ]
        if same == len(forward) or same == len(replay):
            lines.append(f"The first {same} are the same; one run ends there.")
        else:
            lines.append(f"The first {same} are the same; they differ at operator {same}.")
        for title, log in (("forward", forward), ("replay", replay)):
            lines.append(f"  {title}:")
            for i in range(max(0, same - 3), min(len(log), same + 4)):
                mark = "-->" if i == same else "   "
                lines.append(f"  {mark} {i:4d}  {log[i].text}")
                if i == same:
                    lines.extend(f"              at {place}" for place in log[i].stack)
            if same >= len(log):
                lines.append(f"  --> {same:4d}  (nothing more)")
        return "\n".join(lines)


class _Reusable(AbstractContextManager[Any]):
    """A context that may be entered once per replay, each time made anew."""

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make = make
        self._active: list[AbstractContextManager[Any]] = []

    def __enter__(self) -> Any:
        context = self._make()
        result = context.__enter__()
        self._active.append(context)
        return result

    def __exit__(self, *exc: Any) -> bool | None:
        return self._active.pop().__exit__(*exc)


def debug_enabled(argument: bool) -> bool:
    """The argument, unless :class:`set_checkpoint_debug_enabled` says otherwise."""
    setting = debug_setting.get()
    return argument if setting is None else setting

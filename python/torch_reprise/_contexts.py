"""The contexts of ``context_fn``: their types, and the one place that calls and checks it.

And the context managers of settings.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ContextDecorator
from contextvars import ContextVar, Token
from typing import Any

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
ContextFn = Callable[[], Contexts]


def make_contexts(context_fn: ContextFn) -> Contexts:
    """The context of the forward and the one of the replays.

    As the ``with`` statement does, the types are asked: a class that was not
    called has the methods and is no context manager.

    Raises:
        TypeError: ``context_fn`` did not return two context managers.
    """
    pair: Any = context_fn()
    if (
        isinstance(pair, (tuple, list))
        and len(pair) == 2
        and all(hasattr(type(c), "__enter__") and hasattr(type(c), "__exit__") for c in pair)
    ):
        return pair[0], pair[1]
    raise TypeError(
        "context_fn must return two context managers, one for the forward and one for the "
        f"replay; it returned {pair!r:.200}"
    )


class ContextSetting(ContextDecorator):
    """Gives a context variable a value for a block, or for each call of a function.

    May be entered again inside of its block, and on several threads or in several tasks at once.
    """

    def __init__(self, variable: ContextVar[bool | None], value: bool | None) -> None:
        self._variable = variable
        self._value = value

    def __enter__(self) -> None:
        _open_blocks.set((*_open_blocks.get(), (self, self._variable.set(self._value))))

    def __exit__(self, *exc: object) -> None:
        blocks = _open_blocks.get()
        last = max(i for i, (setting, _) in enumerate(blocks) if setting is self)
        _open_blocks.set((*blocks[:last], *blocks[last + 1 :]))
        self._variable.reset(blocks[last][1])


# The blocks of all settings that are open in this context, outermost first. One variable for all:
# a context keeps every variable that was ever set in it.
_open_blocks: ContextVar[tuple[tuple[ContextSetting, Token[bool | None]], ...]] = ContextVar(
    "torch_reprise.open_blocks", default=()
)

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
        # Of the blocks that are open in this context.
        self._tokens: ContextVar[tuple[Token[bool | None], ...]] = ContextVar(
            "torch_reprise.tokens", default=()
        )

    def __enter__(self) -> None:
        self._tokens.set((*self._tokens.get(), self._variable.set(self._value)))

    def __exit__(self, *exc: object) -> None:
        *outer, last = self._tokens.get()
        self._tokens.set(tuple(outer))
        self._variable.reset(last)

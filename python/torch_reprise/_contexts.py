"""The contexts of ``context_fn``: their types, and the one place that calls and checks it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
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

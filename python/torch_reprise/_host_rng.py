"""Python's ``random`` and NumPy's global generator, on request.

Their states are Python objects of a few kilobytes, so this is the one part of a
segment's bookkeeping that is written in Python, and it is off unless asked for
(``Checkpointer(preserve_host_rng=True)``). Only the global generators: explicit
``random.Random`` and ``numpy.random.Generator`` objects are not looked for.
"""

from __future__ import annotations

import random
import sys
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

from . import _C
from ._contexts import ContextFn, Contexts


class _State(NamedTuple):
    python: Any
    numpy: Any  # None if NumPy was not imported

    @classmethod
    def capture(cls) -> _State:
        numpy = sys.modules.get("numpy.random")
        return cls(random.getstate(), None if numpy is None else numpy.get_state())

    def restore(self) -> None:
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy.random"].set_state(self.numpy)


class _Replay(AbstractContextManager[None]):
    """Rewinds the host generators to where the forward began; once per replay.

    Replays take turns with them: they belong to all threads.
    """

    def __init__(self, begin: list[_State], inner: AbstractContextManager[Any]) -> None:
        self._begin = begin
        self._inner = inner
        self._outer: list[tuple[_C.HostGeneratorsTurn, _State]] = []

    def __enter__(self) -> None:
        turn = _C.HostGeneratorsTurn()
        turn.take()
        outer = _State.capture()
        try:
            self._begin[0].restore()
            self._inner.__enter__()
        except BaseException:
            outer.restore()
            turn.give_back()
            raise
        self._outer.append((turn, outer))

    def __exit__(self, *exc: Any) -> bool | None:
        try:
            return self._inner.__exit__(*exc)
        finally:
            turn, outer = self._outer.pop()
            outer.restore()
            turn.give_back()


def with_host_rng(context_fn: ContextFn | None) -> ContextFn:
    """A context_fn that also notes and rewinds the host generators."""

    def contexts() -> Contexts:
        forward, replay = (nullcontext(), nullcontext()) if context_fn is None else context_fn()
        begin: list[_State] = []

        @contextmanager
        def noting() -> Any:
            begin.append(_State.capture())
            with ExitStack() as stack:
                stack.enter_context(forward)
                yield

        return noting(), _Replay(begin, replay)

    return contexts

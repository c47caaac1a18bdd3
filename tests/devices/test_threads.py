"""Threads that work on devices of their own, as replicas of a model do.

No lease is needed between them: their generators are different ones. So whatever one thread does to
its generator, the segments of the other give the numbers they gave alone, and raise nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from helpers import Run, assert_exact, both_forms, plain
from testdev import DEVICES, draws, draws_nothing, leaf_on, on_devices
from torch import Tensor

TIMEOUT = 60.0


class Meanwhile:
    """A function of one call in which another thread does something from beginning to end."""

    def __init__(self, function: Callable[[Tensor], Tensor], call: int) -> None:
        self.function = function
        self.call = call
        self.calls = 0
        self.action: Callable[[], object] = lambda: None
        self.errors: list[BaseException] = []

    def _act(self) -> None:
        try:
            self.action()
        except BaseException as error:
            error.__traceback__ = None
            self.errors.append(error)

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.call:
            thread = threading.Thread(target=self._act, daemon=True)
            thread.start()
            thread.join(TIMEOUT)
            assert not thread.is_alive(), "the other thread hangs: deadlock?"
            if self.errors:
                raise self.errors.pop()
        return self.function(x)


@both_forms
def test_a_replay_that_draws_nothing_begins_in_anothers_turn(use_reentrant: bool) -> None:
    """It must not take the rewound generators that it meets for where the program left them."""

    def program(run: Run) -> Any:
        xs = [leaf_on(device, 16) for device in DEVICES]
        second_began, first_ended = threading.Event(), threading.Event()
        errors: list[BaseException] = []
        calls = [0, 0]

        def backward_of_second() -> None:
            try:
                outs[1].sum().backward()
            except BaseException as error:
                error.__traceback__ = None
                errors.append(error)
                second_began.set()

        thread = threading.Thread(target=backward_of_second, daemon=True)

        def first(x: Tensor) -> Tensor:
            x = draws(x)
            calls[0] += 1
            if calls[0] == 2:  # the generator of device 0 is rewound now
                thread.start()
                second_began.wait(1.0)  # in vain, if the second waits for its turn
            return x.sin()

        def second(x: Tensor) -> Tensor:
            calls[1] += 1
            if calls[1] == 2:
                second_began.set()
                assert first_ended.wait(TIMEOUT)
            return draws_nothing(x)

        outs = [run(first, xs[0]), run(second, xs[1])]
        torch.rand(3, device=DEVICES[0])
        outs[0].sum().backward()
        first_ended.set()
        if run is plain:
            backward_of_second()
        else:
            thread.join(TIMEOUT)
            assert not thread.is_alive(), "the other thread hangs: deadlock?"
        if errors:
            raise errors.pop()
        return outs, [x.grad for x in xs]

    assert_exact(on_devices(program), replays=2, use_reentrant=use_reentrant)

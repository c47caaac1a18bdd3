"""Replays in autograd's device threads, and threads that meet at one segment.

Autograd runs the nodes of each device in a thread of its own. Where a segment has tensors on
several devices, each of these threads wants its saved tensors: one replays, the others wait for
it. `Waits` makes them ask at the same moment, round after round.
"""

from __future__ import annotations

import faulthandler
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cuda_helpers import draws, generator, leaf, needs_devices, offsets
from helpers import both_forms, checkpointed, plain
from torch import Tensor

from torch_reprise import GraphExecGroup, checkpoint, ledger

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("seeded"), needs_devices(8)]

DEVICE_COUNTS = pytest.mark.parametrize("count", [2, 8])
ROUNDS = 40
TIMEOUT = 60.0


@pytest.fixture(autouse=True)
def no_deadlock() -> Iterator[None]:
    """A thread that hangs ends the process, with the stacks of all."""
    faulthandler.dump_traceback_later(2 * TIMEOUT, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


class Waits(torch.autograd.Function):
    """In backward, waits until as many threads are here as a barrier wants, or for an event."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, until: threading.Barrier | threading.Event) -> Tensor:
        ctx.until = until
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        assert ctx.until.wait(TIMEOUT) is not False, "nobody has set the event"
        return grad, None


class Noted:
    """A function that knows in which thread it was called, and where the generators stood."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.threads: list[int] = []
        self.offsets: list[list[tuple[int, int]]] = []

    def __call__(self, *args: Any) -> Any:
        self.threads.append(threading.get_ident())
        self.offsets.append(offsets())
        return self.function(*args)


@both_forms
def test_a_replay_runs_in_the_thread_of_its_device(use_reentrant: bool) -> None:
    fn = Noted(draws)
    y = checkpoint(fn, leaf("cuda:5"), use_reentrant=use_reentrant)
    torch.rand(4, device="cuda:5")
    standing = offsets()
    y.sum().backward()
    forward, replay = fn.threads
    assert forward == threading.get_ident() != replay
    assert fn.offsets[0] == fn.offsets[1]
    assert offsets() == standing


def each(*xs: Tensor) -> list[Tensor]:
    return [draws(x) for x in xs]


@DEVICE_COUNTS
def test_threads_that_race_for_one_segment(count: int) -> None:
    """Each device's thread asks for its own tensors of the segment, all at once."""
    barrier = threading.Barrier(count)
    for _ in range(ROUNDS):
        torch.cuda.manual_seed_all(7)
        xs = [leaf(f"cuda:{device}") for device in range(count)]
        fn = Noted(each)
        outs = checkpoint(fn, *xs, use_reentrant=False)
        torch.rand(4, device="cuda:1")
        standing = offsets()
        before = ledger.replays()
        torch.autograd.backward([Waits.apply(out, barrier).sum() for out in outs])
        assert ledger.replays() == before + 1 and len(fn.threads) == 2
        assert fn.offsets[0] == fn.offsets[1]
        assert offsets() == standing
        assert all(x.grad is not None for x in xs)


@DEVICE_COUNTS
def test_threads_that_race_for_the_segment_inside_of_another(count: int) -> None:
    """The inner one's replay asks for its inputs, which are slots of the outer one."""
    barrier = threading.Barrier(count)
    for _ in range(ROUNDS // 2):
        torch.cuda.manual_seed_all(7)
        xs = [leaf(f"cuda:{device}") for device in range(count)]
        inner = Noted(each)
        outer = Noted(lambda *xs, inner=inner: checkpoint(inner, *each(*xs), use_reentrant=False))
        outs = checkpoint(outer, *xs, use_reentrant=False)
        standing = offsets()
        torch.autograd.backward([Waits.apply(out, barrier).sum() for out in outs])
        assert (len(outer.threads), len(inner.threads)) == (2, 2)
        assert outer.offsets[0] == outer.offsets[1]
        assert inner.offsets[0] == inner.offsets[1]
        assert offsets() == standing


@DEVICE_COUNTS
def test_the_reentrant_form_replays_once_for_all_devices(count: int) -> None:
    """Its one node has the gradients of all devices; its inner backward runs on all of them."""
    barrier = threading.Barrier(count)
    for _ in range(ROUNDS // 2):
        torch.cuda.manual_seed_all(7)
        xs = [leaf(f"cuda:{device}") for device in range(count)]
        fn = Noted(each)
        outs = checkpoint(fn, *xs, use_reentrant=True)
        torch.rand(4, device="cuda:1")
        standing = offsets()
        torch.autograd.backward([Waits.apply(out, barrier).sum() for out in outs])
        assert len(fn.threads) == 2 and fn.offsets[0] == fn.offsets[1]
        assert offsets() == standing
        assert all(x.grad is not None for x in xs)


@DEVICE_COUNTS
def test_threads_that_race_in_a_group(count: int) -> None:
    """Two backward calls, in each of which all threads ask at once; one replay serves both."""
    barrier = threading.Barrier(count)
    for _ in range(ROUNDS // 2):
        torch.cuda.manual_seed_all(7)
        xs = [leaf(f"cuda:{device}") for device in range(count)]
        fn = Noted(each)
        outs = checkpoint(fn, *xs, use_reentrant=False)
        standing = offsets()
        before = ledger.replays()
        with GraphExecGroup():
            waiting = [Waits.apply(out, barrier).sum() for out in outs]
            torch.autograd.backward(waiting, retain_graph=True)
            barrier.reset()
            torch.autograd.backward(waiting)
        assert ledger.replays() == before + 1
        assert fn.offsets[0] == fn.offsets[1]
        assert offsets() == standing


@DEVICE_COUNTS
@both_forms
def test_replays_of_different_devices_do_not_wait_for_each_other(
    count: int, use_reentrant: bool
) -> None:
    """Each waits inside of its replay until all are in theirs: turns would be a deadlock."""
    barrier = threading.Barrier(count)
    calls: dict[int, int] = {}

    def fn(x: Tensor) -> Tensor:
        device = x.get_device()
        calls[device] = calls.get(device, 0) + 1
        if calls[device] == 2:
            barrier.wait(TIMEOUT)
        assert generator(device).get_offset() == 0
        return draws(x)

    xs = [leaf(f"cuda:{device}") for device in range(count)]
    outs = [checkpoint(fn, x, use_reentrant=use_reentrant) for x in xs]
    for device in range(count):
        torch.rand(4, device=f"cuda:{device}")
    standing = offsets()
    torch.autograd.backward([out.sum() for out in outs])
    assert calls == dict.fromkeys(range(count), 2)
    assert offsets() == standing


@both_forms
def test_a_thread_that_waits_inside_of_a_replay_replays_what_else_is_ready(
    use_reentrant: bool,
) -> None:
    """Its turn with the generator is the outer replay's, which it cannot wait for."""

    def program(run: Callable[..., Tensor]) -> list[Any]:
        torch.manual_seed(7)
        xs = [leaf(), leaf()]
        replayed = threading.Event()
        threads: list[list[int]] = [[], []]

        def waits(x: Tensor) -> Tensor:
            threads[0].append(threading.get_ident())
            x = draws(x)
            if len(threads[0]) == 2:
                y = leaf("cuda:0")
                torch.autograd.grad(Waits.apply(y, replayed), y, torch.ones_like(y))
                assert len(threads[1]) == 2
            return draws(x)

        def is_ready(x: Tensor) -> Tensor:
            threads[1].append(threading.get_ident())
            x = draws(x)
            if len(threads[1]) == 2:
                replayed.set()
            return draws(x)

        outs = [run(is_ready, xs[0]), run(waits, xs[1])]  # the last one is replayed first
        torch.rand(3)
        torch.autograd.backward([out.sum() for out in outs])
        assert run is plain or threads == [[threading.get_ident()] * 2] * 2
        return [*outs, *(x.grad for x in xs), torch.get_rng_state()]

    run = checkpointed(use_reentrant=use_reentrant)
    for expected, found in zip(program(plain), program(run), strict=True):
        assert torch.equal(expected, found)

"""Several threads, locks and processes: nobody waits for ever, and nothing is mixed."""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import dropout

from torch_reprise import _C, CheckpointError, GraphExecGroup, checkpoint, ledger


@pytest.fixture(autouse=True)
def no_deadlock() -> Iterator[None]:
    """A thread that hangs ends the process, with the stacks of all."""
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def leaf(n: int = 4) -> Tensor:
    return torch.linspace(0.1, 1.0, n).requires_grad_()


def run(fn: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(fn, *args, use_reentrant=False)


def in_threads(*functions: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(f,)) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_counters_are_read_while_groups_replay() -> None:
    """A group is a Python object; taking a reference to it needs the interpreter lock."""
    w = leaf(4)
    over = threading.Event()

    def work() -> None:
        try:
            for _ in range(30):
                with GraphExecGroup():
                    sum(run(lambda x: (x * w).sin(), w).sum() for _ in range(3)).backward()
        finally:
            over.set()

    def look() -> None:
        while not over.is_set():
            ledger.live_slots()

    in_threads(work, look)


def test_a_look_at_a_saved_tensor_while_another_thread_unpacks_the_inputs() -> None:
    unpacking, looked = threading.Event(), threading.Event()
    found: list[Tensor] = []

    def unpack(t: Tensor) -> Tensor:
        unpacking.set()
        looked.wait(0.3)
        return t

    x = leaf()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        y = run(lambda t: (t * 1).sin(), x)

    def look() -> None:
        unpacking.wait()
        found.append(y.grad_fn._saved_self)
        looked.set()

    in_threads(lambda: y.sum().backward(retain_graph=True), look)
    assert torch.equal(found[0], x * 1)


def test_a_forgotten_recording_is_closed_by_the_collector() -> None:
    for _ in range(3):
        manager = ledger.record()
        recording = manager.__enter__()
        cycle = [manager, recording]
        cycle.append(cycle)
        run(torch.sin, leaf()).sum().backward()
        rows = recording.rows
        del manager, recording, cycle
        gc.collect()
        assert rows[-1].name
    assert _C.live_segments() == 0


def test_a_replay_that_draws_nothing_inside_of_anothers_turn() -> None:
    drawing, begun, over = (threading.Event() for _ in range(3))
    calls = {"noisy": 0, "quiet": 0}

    def noisy(x: Tensor) -> Tensor:
        calls["noisy"] += 1
        y = dropout(x.sin(), 0.5)
        if calls["noisy"] == 2:
            drawing.set()
            begun.wait()
        return y.exp()

    def quiet(x: Tensor) -> Tensor:
        calls["quiet"] += 1
        y = x.sin()
        if calls["quiet"] == 2:
            begun.set()
            over.wait()
        return y.exp()

    noisy_out, quiet_out = run(noisy, leaf(8)), run(quiet, leaf(8))
    torch.rand(100)
    before = torch.get_rng_state()

    def first() -> None:
        noisy_out.sum().backward()
        over.set()

    def second() -> None:
        drawing.wait()
        quiet_out.sum().backward()

    in_threads(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_functions_that_wait_for_each_other_get_an_error() -> None:
    """Two replays cannot both have the one CPU generator, however long they wait."""
    barrier = threading.Barrier(2, timeout=3)
    replaying = threading.Event()

    def fn(x: Tensor) -> Tensor:
        y = dropout(x.sin(), 0.5)
        if replaying.is_set():
            barrier.wait()
        return y.exp()

    outs = [run(fn, leaf(8)) for _ in range(2)]
    replaying.set()
    errors: list[Exception] = []

    def work(out: Tensor) -> None:
        try:
            out.sum().backward()
        except (CheckpointError, threading.BrokenBarrierError) as error:
            errors.append(error)

    state = torch.get_rng_state()
    _C.set_lease_wait_limit(0.3)
    try:
        in_threads(lambda: work(outs[0]), lambda: work(outs[1]))
    finally:
        _C.set_lease_wait_limit(300.0)
    message = next(str(e) for e in errors if isinstance(e, CheckpointError))
    assert "waited 0.3 s for the random generator cpu" in message and "barrier" in message
    assert torch.equal(torch.get_rng_state(), state)
    assert len(errors) == 2
    errors.clear()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_while_another_thread_has_the_turn() -> None:
    has_turn, forked = threading.Event(), threading.Event()
    replaying = threading.Event()

    def slow(x: Tensor) -> Tensor:
        y = dropout(x.sin(), 0.5)
        if replaying.is_set():
            has_turn.set()
            forked.wait()
        return y.exp()

    slow_out = run(slow, leaf())
    out = run(lambda x: dropout(x.sin(), 0.5).exp(), leaf())
    replaying.set()
    status: list[int] = []

    def fork() -> None:
        has_turn.wait()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                signal.alarm(20)  # the parent's watchdog is a thread, and not here
                out.sum().backward()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        forked.set()
        status.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    in_threads(lambda: slow_out.sum().backward(), fork)
    assert status == [0]
